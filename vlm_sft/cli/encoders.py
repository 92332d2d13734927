"""The commands on published models that answer, compare and find in one step: VLE and mPLUG's VQA model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.console import for_a_program, quiet_libraries
from ..base.errors import UserError
from ..train import Json
from .arguments import ImageFolders, settings_of

if TYPE_CHECKING:
    from ..captions.explained import Scheme

encoders_app = typer.Typer()
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a VLE, or of an mPLUG for VQA.", show_default=False)
]


@encoders_app.command(short_help="Likeliest answers of a VLE or mPLUG, with their scores.")
def answer(
    model: Model,
    question: Annotated[str | None, typer.Argument(metavar="QUESTION", show_default=False)] = None,
    image: Annotated[str | None, typer.Option("--image", help="The image that is asked about.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many answers.")] = 5,
    questions: Annotated[str | None, typer.Option(metavar="FILE", help="Answer a file of questions.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="With --questions: JSONL file; a rerun resumes it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    images: Annotated[str | None, typer.Option(help="Folder that relative image paths start from.")] = None,
    image_folder: ImageFolders = None,
    candidates: Annotated[
        str | None, typer.Option(metavar="FILE", help="Choose among these answers: a JSON list, or one a line.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="BERT's, for an mPLUG that is one weight file: google-bert/bert-base-uncased.")
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(metavar="LLM", help="Language model to answer by them: folder, Hub id, bundle, URL."),
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="With --llm: what says to it what the picture shows, as in `data caption`.")
    ] = None,
    llm_model: Annotated[str | None, typer.Option(help="Its name, where --llm is the URL of a server.")] = None,
    llm_key: Annotated[str | None, typer.Option(metavar="VAR", help="Variable that holds the server's key.")] = None,
    llm_set: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of the LLM.")] = None,
    reply: Annotated[str | None, typer.Option(help="With --llm: sentence or letter.")] = None,
    language: Annotated[str | None, typer.Option(help="With --llm: en or zh; default that of the question.")] = None,
    as_json: Json = False,
) -> None:
    """Answer one question about an image, or a file of questions: the likeliest answers with their scores, or what an
    LLM makes of them and of a caption."""
    quiet_libraries()
    many = questions is not None and question is None and image is None and output is not None
    one = questions is None and question is not None and image is not None and output is None
    if not (many or one):
        raise UserError("Give a question with --image FILE, or --questions FILE with --output FILE.")
    given = {"--llm": llm, "--captioner": captioner, "--llm-model": llm_model, "--llm-key": llm_key,
             "--llm-set": llm_set, "--reply": reply, "--language": language}  # fmt: skip
    scheme, further = _scheme(given), (candidates, tokenizer)
    from ..captions.explained import explain_many, explain_one
    from ..inference.encoder import answer_many, answer_one

    with for_a_program(as_json) as give:
        if many:
            file = (str(questions), str(output), top, batch_size)
            more = (images, image_folder or (), *further)
            give(answer_many(model, *file, *more) if scheme is None else explain_many(model, *file, scheme, *more))
        else:
            asked = (str(question), str(image), top)
            give(
                answer_one(model, *asked, *further) if scheme is None else explain_one(model, *asked, scheme, *further)
            )


def _scheme(given: dict[str, Any]) -> Scheme | None:
    """How a language model is asked on; None where none is named."""
    if given["--llm"] is None:
        if alone := next((name for name, value in given.items() if value), None):
            raise UserError(f"{alone} belongs to --llm; name the language model, or leave it out.")
        return None
    if given["--captioner"] is None:
        raise UserError("--llm sees no picture: name what says to it what a picture shows, with --captioner.")
    from ..captions.explained import Scheme

    settings = settings_of(given["--llm-set"], "--llm-set")
    return Scheme(
        given["--llm"], given["--captioner"], given["--llm-model"], given["--llm-key"], settings,
        given["--reply"] or "sentence", given["--language"],
    )  # fmt: skip


@encoders_app.command(short_help="How well texts match an image, by a VLE; or where in it one is.")
def match(
    model: Model,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT…", show_default=False)],
    image: Annotated[str, typer.Option("--image", help="The image.")],
    draw: Annotated[
        str | None, typer.Option(metavar="PNG", help="Write the picture with the patches bright that show the text.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how likely each text belongs to the image; with --draw, where in the image a text is."""
    quiet_libraries()
    from ..inference.encoder import draw_text, match_texts

    if draw is not None and len(texts) != 1:
        raise UserError(f"--draw shows where one text is, and {len(texts)} were given: run it once for each.")
    with for_a_program(as_json) as give:
        give(match_texts(model, texts, image) if draw is None else draw_text(model, texts[0], image, draw))
