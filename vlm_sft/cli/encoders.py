"""The commands on published models that answer, compare and find in one step: VLE and mPLUG's VQA model."""

from __future__ import annotations

from typing import Annotated

import typer

from ..base.console import for_a_program, quiet_libraries
from ..base.errors import UserError
from ..train import Json
from .arguments import ImageFolders

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
    as_json: Json = False,
) -> None:
    """Answer one question about an image, or a file of questions: the likeliest answers with their scores."""
    quiet_libraries()
    from ..inference.encoder import answer_many, answer_one

    with for_a_program(as_json) as give:
        if questions is not None and question is None and image is None and output is not None:
            folders = image_folder or ()
            give(answer_many(model, questions, output, top, batch_size, images, folders, candidates, tokenizer))
            return
        if questions is None and question is not None and image is not None and output is None:
            give(answer_one(model, question, image, top, candidates, tokenizer))
            return
        raise UserError("Give a question with --image FILE, or --questions FILE with --output FILE.")


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
