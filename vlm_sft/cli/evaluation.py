"""The command that measures a bundle: on held-out data of a recipe, or on benchmarks."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.console import for_a_program, quiet_libraries
from ..base.errors import UserError
from ..forgetting.texts import Wish
from ..train import Json, Trust
from .arguments import Bundle, Options, settings_of

if TYPE_CHECKING:
    from ..judging.judge import Judge

evaluation_app = typer.Typer()

Benchmark = Annotated[
    str | None,
    typer.Option(metavar="NAME[,NAME]", help="Benchmarks that ship, or files of your own; see docs/evaluation.md."),
]
BenchmarkData = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder of the benchmarks' data. Default: the Hub.")
]
Prompt = Annotated[
    str | None, typer.Option(help="Ask benchmarks so, not as they say: 'Question: {{ question }} Answer:'.")
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="Default: eval.json, or evaluation/, in the bundle.")
]
Against = Annotated[
    str | None,
    typer.Option(metavar="OTHER", help="Bundle, or its answers, that the page compares with; asked too if need be."),
]
Forgetting = Annotated[
    bool | None,
    typer.Option(show_default=False, help="What texts without pictures lost. Default: if no base must be read."),
]
ForgettingTexts = Annotated[str | None, typer.Option(metavar="FILE", help="Such texts of your own, as JSON lines.")]
ForgettingPictures = Annotated[
    str | None, typer.Option(metavar="DIR", help="For a vision tower that was trained: a folder for each label.")
]
JudgeUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="OpenAI-compatible server that scores answers, up to its /v1.")
]
JudgeKey = Annotated[
    str | None, typer.Option(metavar="VARIABLE", help="Environment variable with its key. Default: none is sent.")
]
JudgePrice = Annotated[
    str | None, typer.Option(metavar="ASKED,ANSWERED", help="Prices of a million tokens, to count the cost.")
]
JudgeSet = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of the judge, like temperature=0; repeat.")
]


@evaluation_app.command(short_help="Measure a bundle on held-out data or benchmarks.")
def evaluate(
    bundle: Bundle,
    benchmark: Benchmark = None,
    benchmark_data: BenchmarkData = None,
    prompt: Prompt = None,
    split: Annotated[str, typer.Option(help="Without --benchmark: test or eval of the recipe's data.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    output: Output = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each source.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Take the data from this recipe, not the bundle's own.")] = None,
    likelihood: Annotated[bool, typer.Option("--likelihood", help="Choose the option that is likeliest.")] = False,
    option_texts: Annotated[bool, typer.Option("--option-texts", help="… by its text, not by its letter.")] = False,
    blank: Annotated[bool, typer.Option(help="Ask with blanked images too.")] = True,
    confidence: Annotated[bool, typer.Option("--confidence", help="How sure it was also of options compared.")] = False,
    contamination: Annotated[bool, typer.Option(help="Look for the images in the training sources.")] = True,
    against: Against = None,
    forgetting: Forgetting = None,
    forgetting_texts: ForgettingTexts = None,
    forgetting_pictures: ForgettingPictures = None,
    judge: JudgeUrl = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="The judge's model there.")] = None,
    judge_key: JudgeKey = None,
    judge_price: JudgePrice = None,
    judge_requests: Annotated[int, typer.Option(min=1, max=256, help="How many at a time.")] = 8,
    judge_set: JudgeSet = None,
    options: Options = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure a bundle on held-out data or benchmarks; on several processes: accelerate launch -m vlm_sft.evaluate."""
    wish = Wish(forgetting, forgetting_texts, forgetting_pictures)
    if benchmark is None:
        of_benchmarks = {
            "--benchmark-data": benchmark_data, "--likelihood": likelihood, "--confidence": confidence,
            "--option-texts": option_texts, "--prompt": prompt, "--set": options, "--no-blank": not blank,
            "--no-contamination": not contamination, "--judge": judge,
        }  # fmt: skip
        if alone := next((name for name, given in of_benchmarks.items() if given), None):
            raise UserError(f"{alone} belongs to --benchmark; name benchmarks, or leave it out.")
        from ..evaluation.evaluate import run

        with for_a_program(as_json) as give:
            give(run(bundle, split=split, batch_size=batch_size, output=output, max_rows=max_rows, recipe=recipe,
                     trust_remote_code=trust_remote_code, against=against, forgetting=wish))  # fmt: skip
        return
    if recipe is not None:
        raise UserError("--recipe belongs to the recipe's own data; leave it or --benchmark out.")
    if option_texts and not likelihood:
        raise UserError("--option-texts belongs to --likelihood; write both, or leave both out.")
    who = _judge(judge, judge_model, judge_key, judge_price, judge_requests, judge_set)
    quiet_libraries()
    from ..evaluation.asking import How
    from ..evaluation.benchmark import run as run_benchmarks

    how = How({}, batch_size, "texts" if option_texts else likelihood, blank=blank, confidence=confidence)
    names = [name for name in map(str.strip, benchmark.split(",")) if name]
    with for_a_program(as_json) as give:
        give(run_benchmarks(bundle, names, data=benchmark_data, output=output, how=how, max_rows=max_rows,
                            compare=contamination, options=settings_of(options), trust_remote_code=trust_remote_code,
                            against=against, judge=who, prompt=prompt, forgetting=wish))  # fmt: skip


def _judge(
    url: str | None, model: str | None, key: str | None, price: str | None, requests: int, assignments: list[str] | None
) -> Judge | None:
    if url is None:
        given = {"--judge-model": model, "--judge-key": key, "--judge-price": price, "--judge-set": assignments}
        if alone := next((name for name, value in given.items() if value), None):
            raise UserError(f"{alone} belongs to --judge; name its server, or leave it out.")
        return None
    if not model:
        raise UserError("--judge names a server; name the model there too, with --judge-model.")
    from ..judging.judge import Judge
    from ..judging.server import TAKEN

    prices = None
    if price is not None:
        try:
            asked, answered = map(float, price.split(","))
            assert 0 <= asked < inf and 0 <= answered < inf
            prices = asked, answered
        except (ValueError, AssertionError):
            raise UserError(
                f"--judge-price {price} is not understood; write two prices, like 2.5,10: of a million tokens asked, "
                "and of a million answered."
            ) from None
    settings = settings_of(assignments, "--judge-set")
    if taken := TAKEN & settings.keys():
        raise UserError(f"--judge-set {min(taken)} is not yours to set; leave it out.")
    return Judge(url, model, key, prices, requests, settings)
