"""Benchmarks of three to six rows, with columns, types and files as they are published on the Hub and by authors."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

from support.benchmark_files import document, inside, lines, parquet, picture, png, ten


def vqav2(folder: Path) -> None:
    parquet(folder / "data" / "validation-00000-of-00001.parquet", [{"question_type": "is this",
        "multiple_choice_answer": "yes", "answers": ten("yes"), "image_id": 42 + n % 2, "answer_type": "yes/no"
        if n else "other", "question_id": 42000 + n, "question": f"Is it {n}?", "image": inside(n % 2)}
        for n in range(4)])  # fmt: skip


def vqav2_authors(folder: Path) -> None:
    document(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014",
        "questions": [{"image_id": 42, "question": f"什么 {n}?", "question_id": 42000 + n} for n in range(3)],
    })  # fmt: skip
    document(folder / "v2_mscoco_val2014_annotations.json", {"annotations": [{"question_type": "what",
        "multiple_choice_answer": "net", "answers": ten("net", "netting"), "image_id": 42, "answer_type": "other",
        "question_id": 42000 + n} for n in (2, 0, 1)]})  # fmt: skip
    picture(folder / "val2014" / "COCO_val2014_000000000042.jpg", 42)


def okvqa(folder: Path) -> None:
    parquet(folder / "data" / "val2014-00000-of-00001.parquet", [{"question_id": f"{n}", "image": inside(n),
        "question": "What sport?", "answers": ["race"] * 7 + ["motocross"] * 3, "question_type": "four",
        "answer_type": "other"} for n in range(3)])  # fmt: skip


def okvqa_authors(folder: Path) -> None:
    questions = [{"image_id": 7, "question": "What sport?", "question_id": 70 + n} for n in range(3)]
    document(folder / "OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    document(folder / "mscoco_val2014_annotations.json", {"annotations": [{"image_id": 7, "answer_type": "other",
        "question_type": "four", "question_id": 70 + n, "answers": [{**one, "raw_answer": one["answer"]}
        for one in ten("race")], "confidence": 3} for n in range(3)]})  # fmt: skip
    picture(folder / "val2014" / "COCO_val2014_000000000007.jpg", 7)


def gqa(folder: Path) -> None:
    parquet(folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", [{"id": f"2011{n}",
        "imageId": f"n{n % 2}", "question": "Is it overcast?", "answer": "no", "fullAnswer": "No, it is clear.",
        "isBalanced": True, "types": {"detailed": "weather", "semantic": "global", "structural": "verify"
        if n else "query"}} for n in range(4)])  # fmt: skip
    images = [{"id": f"n{n}", "image": inside(n)} for n in range(2)]
    parquet(folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)


def gqa_authors(folder: Path) -> None:
    types = {"detailed": "weather", "semantic": "global", "structural": "verify"}
    questions = {f"2013{n}": {"imageId": "n16", "question": "Is it overcast?", "answer": "no",
        "isBalanced": True, "types": types} for n in range(3)}  # fmt: skip
    document(folder / "testdev_balanced_questions.json", questions)
    picture(folder / "images" / "n16.jpg", 16)


def gqa_zh(folder: Path) -> None:
    questions = {f"2014{n}": {"imageId": "n16", "question": "天空是什么颜色的？", "answer": "蓝色"} for n in range(3)}
    document(folder / "testdev_balanced_questions_zh.json", questions)
    picture(folder / "images" / "n16.jpg", 16)


def textvqa(folder: Path) -> None:
    parquet(folder / "data" / "validation-00000-of-00003.parquet", [{"image_id": "003a8ae2ef43b901",
        "question_id": 34602 + n, "question": "what is the brand of this camera?", "question_tokens": ["what",
        "is"], "image": inside(n), "ocr_tokens": ["DAKOTA"], "answers": ["dakota"] * 9 + ["nous"],
        "set_name": "val"} for n in range(3)])  # fmt: skip


def textvqa_authors(folder: Path) -> None:
    document(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [{"question": "what is it?",
        "image_id": "003a", "image_classes": ["Cassette deck"], "question_id": 34602 + n, "answers": ["nous"] * 10}
        for n in range(3)]})  # fmt: skip
    picture(folder / "train_images" / "003a.jpg", 3)


def vizwiz(folder: Path) -> None:
    parquet(folder / "data" / "val-00000-of-00005.parquet", [{"question_id": f"VizWiz_val_0000000{n}.jpg",
        "image": inside(n), "question": "Ok. There is another picture?", "answers": ["soda",
        "unanswerable"] * 5, "category": "other"} for n in range(3)])  # fmt: skip


def vizwiz_authors(folder: Path) -> None:
    document(folder / "val.json", [{"image": f"VizWiz_val_0000000{n}.jpg", "question": "What is this?",
        "answer_type": "other", "answerable": 1, "answers": [{"answer_confidence": "yes", "answer": "soda"}] * 10}
        for n in range(3)])  # fmt: skip
    for n in range(3):
        picture(folder / "val" / f"VizWiz_val_0000000{n}.jpg", n)


def pope(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00003.parquet", [{"id": str(n), "question_id": str(n % 3 + 1),
        "question": f"Is there a {['dog', 'cat'][n % 2]} in the image?", "answer": ["yes", "no"][n % 2],
        "image_source": "COCO_val2014_1", "image": inside(n % 2), "category": ["random", "popular"][n // 3]}
        for n in range(6)])  # fmt: skip


def pope_authors(folder: Path) -> None:
    for name in ("random", "popular", "adversarial"):
        lines(folder / f"coco_pope_{name}.json", [{"question_id": n, "image": "COCO_val2014_000000310196.jpg",
            "text": "Is there a snowboard in the image?", "label": ["yes",
        "no"][n % 2]} for n in (1, 2)])  # fmt: skip
    picture(folder / "val2014" / "COCO_val2014_000000310196.jpg", 9)


def _mmbench(folder: Path, name: str, question: str, options: list[str]) -> None:
    shifts = [(0, "A"), (1_000_000, "C")]
    parquet(folder / name / "dev-00000-of-00001.parquet", [{"index": 241 + n + shift, "question": question,
        "hint": "nan" if n else "The passage.", "answer": answer, "A": options[shift > 0],
        "B": options[1 + (shift > 0)], "C": options[2 - 2 * (shift > 0)], "D": "nan",
        "category": "identity_reasoning", "image": inside(n),
        "source": "scienceqa", "L2-category": "attribute_reasoning", "comment": "nan",
        "split": "dev"} for n in range(2)
        for shift, answer in shifts])  # fmt: skip


def mmbench_en(folder: Path) -> None:
    _mmbench(folder, "en", "Which capital is highlighted?", ["Nashville", "Montgomery", "Atlanta"])


def mmbench_cn(folder: Path) -> None:
    _mmbench(folder, "cn", "图中突出显示的是哪个首府？", ["纳什维尔", "蒙哥马利", "亚特兰大"])


def _mmbench_tsv(folder: Path, name: str, options: list[str], plain: bool) -> None:
    """The authors' table: a rotation may name the picture of its first row by that row's index."""
    rows = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tl2-category\tsplit"]
    encoded = base64.b64encode(png(1)).decode()
    for number, shift in [(n, s) for n in (3, 4) for s in (range(1) if plain else range(2))]:
        turned = [*options[shift:], *options[:shift], ""]
        image = encoded if not shift else str(number)
        cells = [str(number + shift * 1_000_000), "哪个？", "", *turned, "BA"[shift], "ocr", image, "x", "dev"]
        rows.append("\t".join(cells))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def mmbench_en_authors(folder: Path) -> None:
    _mmbench_tsv(folder, "MMBench_DEV_EN.tsv", ["cat", "dog", "bird"], plain=False)


def mmbench_cn_authors(folder: Path) -> None:
    _mmbench_tsv(folder, "MMBench_DEV_CN.tsv", ["猫", "狗", "鸟"], plain=True)


def mmmu(folder: Path) -> None:
    one = {"explanation": "", "img_type": "['Tables']", "topic_difficulty": "Medium", "subfield": "Accounting"}
    none = dict.fromkeys([f"image_{n}" for n in range(3, 8)])
    parquet(folder / "data" / "validation-00000-of-00001.parquet", [{"id": "validation_Accounting_1",
        "question": "<image 1> Costs are:", "options": "['$6', '$7', '$8']", "answer": "B",
        "question_type": "multiple-choice", "image_1": inside(1), "image_2": None, **none, **one},
        {"id": "validation_Accounting_2",
        "question": "比较 <image 1> 和 <image 2>", "options": "['大', '小']", "answer": "A",
        "question_type": "multiple-choice",
        "image_1": inside(1), "image_2": inside(2), **none, **one}, {"id": "validation_Math_3",
        "question": "How many? <image 1>",
        "options": "[]", "answer": "['24/7', '3.429']", "question_type": "open", "image_1": inside(3),
        "image_2": None, **none, **one, "subfield": "Math"}])  # fmt: skip


def scienceqa(folder: Path) -> None:
    parquet(folder / "ScienceQA-IMG" / "test-00000-of-00001.parquet", [{"image": inside(n),
        "question": "What is the name of the colony?",
        "choices": ["Maryland", "Rhode Island"], "answer": n % 2, "hint": "" if n else "A map.",
        "task": "closed choice",
        "grade": "grade5", "subject": "social science", "topic": "us-history", "category": "Colonial America",
        "skill": "Identify", "lecture": "", "solution": "…"} for n in range(3)])  # fmt: skip


def ai2d(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00001.parquet", [{"question": "which is food?", "options": ["oak",
        "grass", "bird", "cat"], "answer": str(n), "image": inside(n)} for n in range(3)])  # fmt: skip


def chartqa(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00001.parquet", [{"type": ["human_test", "augmented_test"][n % 2],
        "question": "How many?", "answer": "14", "image": inside(n)} for n in range(3)])  # fmt: skip


def chartqa_authors(folder: Path) -> None:
    for name in ("human", "augmented"):
        document(
            folder / f"test_{name}.json", [{"imgname": "41699051005347.png", "query": "多少？", "label": "14"}] * 2
        )
    picture(folder / "test" / "png" / "41699051005347.png", 5)


def docvqa(folder: Path) -> None:
    parquet(folder / "DocVQA" / "validation-00000-of-00001.parquet", [{"questionId": str(49153 + n),
        "question": "What is the title?", "question_types": ["figure/diagram"], "image": inside(n),
        "docId": 14465, "ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81", "answers": ["hospital",
        "Hospital"]} for n in range(3)])  # fmt: skip


def docvqa_authors(folder: Path) -> None:
    document(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [{"questionId": 49153 + n,
        "question": "What?", "question_types": ["layout"], "image": "documents/pybv0228_81.png", "docId": 14465,
        "answers": ["医院"]} for n in range(3)]})  # fmt: skip
    picture(folder / "documents" / "pybv0228_81.png", 6)


def ocrbench(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00001.parquet", [{"dataset": ["IIIT5K", "HME100k", "ReCTS"][n],
        "question": "what is written in the image?", "question_type": ["Regular Text Recognition",
        "Handwritten Mathematical Expression Recognition", "Scene Text-centric VQA"][n], "answer": [["CENTRE"],
        ["x ^ { 2 }"], ["营业"]][n], "image": inside(n)} for n in range(3)])  # fmt: skip


def ocrbench_authors(folder: Path) -> None:
    document(folder / "OCRBench.json", [{"dataset_name": "IIIT5K", "image_path": "IIIT5K/1007_1.png",
        "question": "what is written?", "answers": ["CENTRE"], "type": "Regular Text Recognition", "id": n}
        for n in range(3)])  # fmt: skip
    picture(folder / "IIIT5K" / "1007_1.png", 8)


def _karpathy(folder: Path, name: str, images: str) -> None:
    document(folder / name, {"dataset": "coco", "images": [{"filepath": images, "filename": f"{n}.jpg",
        "imgid": n, "cocoid": 391890 + n, "split": "test" if n else "train",
        "sentences": [{"raw": f"A man on bike {n}.",
        "tokens": ["a"], "imgid": n, "sentid": n}, {"raw": "A person rides.", "tokens": ["a"], "imgid": n,
        "sentid": 9}]} for n in range(4)]})  # fmt: skip
    for n in range(4):
        picture(folder / images / f"{n}.jpg", n)


def coco_caption(folder: Path) -> None:
    _karpathy(folder, "dataset_coco.json", "val2014")


def flickr30k_authors(folder: Path) -> None:
    _karpathy(folder, "dataset_flickr30k.json", "flickr30k-images")


def coco_caption_val(folder: Path) -> None:
    parquet(folder / "data" / "val-00000-of-00001.parquet", [{"question_id": f"COCO_val2014_00000020356{n}.jpg",
        "image": inside(n), "answer": ["A bicycle.", "A bike with a clock."], "id": n, "license": 4,
        "file_name": f"COCO_val2014_00000020356{n}.jpg"} for n in range(3)])  # fmt: skip


def flickr30k(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00009.parquet", [{"image": inside(n), "caption": ["Two young guys.",
        "两个年轻人。"], "sentids": ["0", "1"], "img_id": str(n),
        "filename": f"100009224{n}.jpg"} for n in range(3)])  # fmt: skip


def seed(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00001.parquet", [{"answer": "A", "choice_a": "One",
        "choice_b": "Two", "choice_c": "Three", "choice_d": "Four", "data_id": f"{n}", "data_type": ["image",
        "video"][n % 2], "question": "How many towels?", "question_id": f"10166{n}", "question_type_id": 5,
        "image": [inside(n)] if n % 2 == 0 else [inside(n), inside(n + 1)],
        "segment": None} for n in range(3)])  # fmt: skip


def seed_authors(folder: Path) -> None:
    document(folder / "SEED-Bench.json", {"question_type": {"Scene Understanding": 1}, "questions": [{"answer": "A",
        "choice_a": "一", "choice_b": "二", "choice_c": "三", "choice_d": "四", "data_id": "1454426_2591111986",
        "data_type": ["image", "video"][n == 3], "question": "多少毛巾？", "question_id": f"10166{n}",
        "question_type_id": 5} for n in range(4)]})  # fmt: skip
    picture(folder / "SEED-Bench-image" / "1454426_2591111986", 4)


def mme(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00004.parquet", [{"question_id": f"{kind}/0006.png", "image": inside(n),
        "answer": answer, "category": kind, "question": f"Is a {thing} shown? Please answer yes or no."}
        for n, kind in enumerate(("existence", "code_reasoning")) for thing, answer in (("cat", "Yes"), ("dog",
        "No"))])  # fmt: skip


def mmstar(folder: Path) -> None:
    parquet(folder / "data" / "val-00000-of-00001.parquet", [{"index": n,
        "question": "Which description?\nOptions: A: Cats, B: Dogs, C: Trees, D: Cars",
        "image": inside(n), "answer": "A", "category": "coarse perception", "l2_category": "image scene and topic",
        "meta_info": {"source": "MMBench", "split": "val"}} for n in range(3)])  # fmt: skip


def realworldqa(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00002.parquet", [{"image": inside(n),
        "question": "Which way?\n\nA. Left.\nB. Right.\nPlease answer directly with only the letter.",
        "answer": "B", "image_path": f"{n}.webp"} for n in range(3)])  # fmt: skip


def llava_bench(folder: Path) -> None:
    parquet(folder / "data" / "train-00000-of-00001.parquet", [{"question_id": str(n), "question": "Where is it?",
        "image": inside(n % 2), "category": ["conv", "detail", "complex"][n], "image_id": f"00{n % 2}.jpg",
        "gpt_answer": f"the reference {n}", "caption": "A bay."} for n in range(3)])  # fmt: skip


def llava_bench_authors(folder: Path) -> None:
    _llava_bench(folder, "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", ["A bay.", "Sunny."], "Where is it?")


def llava_bench_zh(folder: Path) -> None:
    _llava_bench(
        folder, *(f"chinese/{name}.jsonl" for name in ("question", "context", "answers")), "海湾。", "这是哪里？"
    )


def _llava_bench(folder: Path, questions: str, context: str, answers: str, caption: object, question: str) -> None:
    lines(folder / questions, [{"question_id": n, "image": f"00{n % 2}.jpg", "text": question,
        "category": ["conv", "detail", "complex"][n]} for n in range(3)])  # fmt: skip
    lines(folder / context, [{"id": f"00{n}", "image": f"00{n}.jpg", "caption": caption} for n in range(2)])
    lines(folder / answers, [{"question_id": n, "prompt": question, "answer_id": f"a{n}", "model_id": "gpt-4",
        "text": f"the reference {n}"} for n in range(3)])  # fmt: skip
    for n in range(2):
        picture(folder / "images" / f"00{n}.jpg", n)


BOXES = [{"category": "cat", "bbox": [0.1, 0.2, 0.3, 0.4]}, {"category": "cat", "bbox": [0.5, 0.5, 0.75, 1.0]}]


def llava_bench_coco(folder: Path) -> None:
    boxes = "\n".join(f"{each['category']}: {each['bbox']}" for each in BOXES)
    parquet(folder / "data" / "train-00000-of-00001.parquet", [{"question_id": str(n), "question": "How many?",
        "image": inside(n % 2), "category": ["conv", "detail", "complex"][n], "image_id": f"00{n % 2}.jpg",
        "answer": f"the reference {n}", "caption": f"A cat.\nTwo cats.\n\n{boxes}"} for n in range(3)])  # fmt: skip


def llava_bench_coco_authors(folder: Path) -> None:
    lines(folder / "qa90_questions.jsonl", [{"question_id": n, "image": "000000441147.jpg", "text": "How many?",
        "category": ["conv", "detail", "complex"][n]} for n in range(3)])  # fmt: skip
    lines(folder / "qa90_gpt4_answer.jsonl", [{"question_id": n, "text": f"the reference {n}", "category": "conv"}
        for n in range(3)])  # fmt: skip
    lines(folder / "caps_boxes_coco2014_val_80.jsonl", [{"id": "000000441147", "image": "000000441147.jpg",
        "captions": ["A cat.", "Two cats."], "instances": BOXES}])  # fmt: skip
    picture(folder / "val2014" / "COCO_val2014_000000441147.jpg", 1)


PUBLISHED: dict[str, Callable[[Path], None]] = {"vqav2": vqav2, "okvqa": okvqa, "gqa": gqa, "gqa_zh": gqa_zh,
    "textvqa": textvqa, "vizwiz": vizwiz, "pope": pope, "mmbench_en": mmbench_en, "mmbench_cn": mmbench_cn,
    "mmmu": mmmu, "scienceqa": scienceqa, "ai2d": ai2d, "chartqa": chartqa, "docvqa": docvqa, "ocrbench": ocrbench,
    "coco_caption": coco_caption, "coco_caption_val": coco_caption_val, "flickr30k": flickr30k, "seed": seed,
    "mme": mme, "mmstar": mmstar, "realworldqa": realworldqa, "llava_bench": llava_bench,
    "llava_bench_coco": llava_bench_coco, "llava_bench_zh": llava_bench_zh}  # fmt: skip
"""Each benchmark that ships, as the Hub has it (or, where it is not there with pictures, as its authors have it)."""

AUTHORS: dict[str, Callable[[Path], None]] = {"vqav2": vqav2_authors, "okvqa": okvqa_authors, "gqa": gqa_authors,
    "textvqa": textvqa_authors, "vizwiz": vizwiz_authors, "pope": pope_authors, "mmbench_en": mmbench_en_authors,
    "mmbench_cn": mmbench_cn_authors, "chartqa": chartqa_authors, "docvqa": docvqa_authors,
        "ocrbench": ocrbench_authors,
    "flickr30k": flickr30k_authors, "seed": seed_authors, "llava_bench": llava_bench_authors,
    "llava_bench_coco": llava_bench_coco_authors}  # fmt: skip
"""Those whose authors' own files are read too."""
