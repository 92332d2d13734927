"""Sentences that a newcomer meets first, in Chinese: by the English one's template, as it stands in the code.

`{}` in a template is what the code puts in there; `{0}`, `{1}` in the Chinese one are these in order. A sentence that
is none of them stays English, and so does what others say within one.
"""

from __future__ import annotations

import re
from functools import cache

from .language import Language, spoken_language

# Of a row's error the code has two pieces, what is wrong and how to mend it, that follow where it is.
CHINESE: dict[str, str] = {
    "the recipe {} does not exist; {}": "配方 {0} 不存在；{1}",
    "these ship: {}.": "自带的有：{0}。",
    "did you mean {}?": "是不是 {0}？",
    '"{}" ships with vlm_sft and can be named like that.': "“{0}” 是自带的，可以直接写这个名字。",
    'did you mean "{}"?': "是不是 “{0}”？",
    "these are valid here: {}.": "这里可用的有：{0}。",
    ": it holds no pictures and no data files.": "：里面没有图片，也没有数据文件。",
    "{} of {} left out, the first: {}": "{1} 中略去 {0}，第一处：{2}",
    "{} left out, the first: {}": "略去 {0}，第一处：{1}",
    "{} left out without a text, the first: {}.": "{0}没有文字而略去，第一张：{1}。",
    "{} is left out: {}": "略去 {0}：{1}",
    "no known format has rows like its first, with {}.": "没有一种已知格式的行像它的第一行，其中有 {0}。",
    "its texts hold numbers alone (boxes?), and no words that could be learned.":
        "其中的文字只有数字（标注框？），没有可以学习的词句。",
    "its first line looks like a row and not like a header: write one above it, such as image,caption.":
        "第一行像数据而不像表头：请在上面加一行表头，例如 image,caption。",
    "it names pictures, but is no table: save it as .csv, in UTF-8, with a first line such as image,caption.":
        "其中写着图片的名字，但它不是表格：请另存为 UTF-8 的 .csv，第一行写表头，例如 image,caption。",
    "{} is not UTF-8: save it as UTF-8.": "{0} 不是 UTF-8：请保存为 UTF-8。",
    "{} is empty: write what the picture shows, or remove it.": "{0} 是空的：请写出图片的内容，或删去它。",
    "{} is a folder; name the recipe's YAML file in it.": "{0} 是文件夹；请写出其中配方的 YAML 文件名。",
    '{}: unknown key "{}"; {}': "{0}：没有 “{1}” 这个键；{2}",
    '{}: the key "{}" is missing.': "{0}：缺少键 “{1}”。",
    '{}: "{}" must not be empty.': "{0}：“{1}” 不能为空。",
    "The data file {} was not found{}: correct the path (relative to the working directory).":
        "找不到数据文件 {0}{1}：请改正路径（相对于当前目录）。",
    "The data file {} was not found (there is no folder {}): correct the path.":
        "找不到数据文件 {0}（没有文件夹 {1}）：请改正路径。",
    "The data file {} is empty (0 bytes): write it again or remove the source.":
        "数据文件 {0} 是空的（0 字节）：请重新写出，或删去这个数据源。",
    'The data file {} ends in "{}", but only {} can be read: convert it.':
        "数据文件 {0} 的后缀是 “{1}”，只能读 {2}：请转换格式。",
    "The pattern {} matches no file: correct it (** searches folders within folders).":
        "没有文件符合 {0}：请改正（** 会搜索下级文件夹）。",
    "The folder {} holds no data file ({}): a folder of images needs a metadata.jsonl with a line "
    '{"file_name": ..., "caption": ...} for each.':
        "文件夹 {0} 里没有数据文件（{1}）：图片文件夹需要 metadata.jsonl，每张图片一行 "
        '{{"file_name": ..., "caption": ...}}；或者先运行 vlm-sft init {0}。',
    'There is no file or folder "{}" here, and as a dataset of the Hub (split "{}") it could not be loaded ({}): '
    "correct the path, or download the dataset first.":
        "这里没有文件或文件夹 “{0}”，也无法作为 Hub 上的数据集（{1}）加载（{2}）：请改正路径，或先下载数据集。",
    "{} of {} images cannot be used; the first is {} ({}), which {}: correct the paths or the source's `images` "
    "folder, or remove the rows.":
        "{1} 张图片中有 {0} 张不能用；第一张是 {2}（{3}），它 {4}："
        "请改正路径或数据源的 `images` 文件夹，或删去这些行。",
    "There are {} GPUs but no launcher, so one process would share its batches out; use `accelerate launch -m "
    "vlm_sft.train RECIPE`, or show it one GPU: CUDA_VISIBLE_DEVICES=0.":
        "有 {0} 块 GPU，却只启动了一个进程；请用 `accelerate launch -m vlm_sft.train RECIPE`，"
        "或只用一块 GPU：CUDA_VISIBLE_DEVICES=0。",
    "{} is no bundle: {}": "{0} 不是训练结果（bundle）：{1}",
    "{} is no run: {}; give the sft.output_dir of one.": "{0} 不是训练目录：{1}；请给出某次训练的 sft.output_dir。",
    "there is no such folder; {}": "没有这个文件夹；{0}",
    "there is no such folder": "没有这个文件夹",
    "it is a file; {}": "它是文件；{0}",
    "it is a file": "它是文件",
    "it has no {}; {}": "里面没有 {0}；{1}",
    "give the output_dir of a finished run.": "请给出训练完成后的 output_dir。",
    "its run did not end; give a checkpoint, {}, or go on with the run: --resume.":
        "训练没有结束；请给出检查点 {0}，或用 --resume 继续训练。",
    "There is no GPU here; say which one it is for, such as --gpu 24GB or --gpu A100.":
        "这里没有 GPU；请说明给哪种 GPU，例如 --gpu 24GB 或 --gpu A100。",
    "--gpu {} says no memory; write 24GB, or a GPU that is known here, such as A100.":
        "--gpu {0} 没有说明显存；请写 24GB，或这里认识的 GPU，例如 A100。",
    "--image-folder {} is no folder: correct it.": "--image-folder {0} 不是文件夹：请改正。",
    "--model {} is a folder without {}: give that of a model, or a Hub id.":
        "--model {0} 这个文件夹里没有 {1}：请给出模型的文件夹，或 Hub 上的名称。",
    "The page needs Gradio, which is not installed: pip install 'vlm-sft[web]'.":
        "网页需要 Gradio，还没有安装：pip install 'vlm-sft[web]'。",
    "The server needs two more packages: pip install 'vlm-sft[serve]'.":
        "服务还需要两个包：pip install 'vlm-sft[serve]'。",
    "{} exists already; name another destination or remove it.": "{0} 已经存在；请换一个目标，或先删除它。",
    "{} exists already and is not overwritten; remove it, or give another --output.":
        "{0} 已经存在，不会覆盖；请先删除它，或用 --output 换一个名字。",
    "{} does not exist; give a folder, a data file, or the id of a data set on the Hub.":
        "{0} 不存在；请给出文件夹、数据文件，或 Hub 上数据集的名称。",
    "{} holds {} and no text to learn; {} now lists them: write what each shows into its column `caption` (or a .txt "
    "beside each picture), then run: {}":
        "{0} 里只有图片（{1}），没有可以学习的文字；{2} 已列出它们：请在 `caption` 一列写出每张图片的内容"
        "（或在图片旁放同名的 .txt），然后运行：{3}",
    "Nobody answered: give --yes to take what is proposed, or the answers as flags.":
        "没有人回答：请用 --yes 采用建议，或用参数给出答案。",
    "{} has nothing that can be learned from{}": "{0} 里没有可以学习的内容{1}",
    "{} {} cannot be had here; choose one of: {}.": "{0} {1} 在这里不行；请选择：{2}。",
    "There are {} different pictures with a text that can be used, and training, validation and test need one each; "
    "bring more, that do not look alike.":
        "可用的、带文字的不同图片只有 {0} 张，而训练、验证和测试各至少要一张；请增加互不相似的图片。",
    "What does {} hold? Give --format, as a recipe does (messages, llava, caption, …).":
        "{0} 是什么格式？请像配方一样给出 --format（messages、llava、caption 等）。",
    "Stopped at once; what was saved before is whole: go on with --resume.":
        "已立即停止；之前保存的内容是完整的：用 --resume 继续。",
    "sft.max_length is {}, but an image makes a row of {} tokens; raise it.":
        "sft.max_length 是 {0}，而一张图片就要 {1} 个 token；请调大。",
    # On pictures, in `web` first of all: what it is called, what is wrong with it, how to mend it.
    "picture {}, {},": "第 {0} 张图片 {1}",
    "is empty (0 bytes)": "是空的（0 字节）",
    "is truncated or damaged ({})": "不完整或已损坏（{0}）",
    "starts like a {} but is truncated or damaged: download it again or remove the row":
        "开头像 {0}，但不完整或已损坏：请重新下载，或删去这一行",
    "has {}, more than the {} allowed": "有 {0}，超过允许的 {1}",
    "{} x {} pixels": "{0} x {1} 像素",
    "is not an image in a format that can be read: convert it to JPEG or PNG":
        "不是能读的图片格式：请转换为 JPEG 或 PNG",
    "is not an image that can be read (it looks like HEIC or a video): {}":
        "不是能读的图片（看起来是 HEIC 或视频）：{0}",
    "is not an image (it looks like {})": "不是图片（看起来是 {0}）",
    "convert it to JPEG or PNG, or name a video under `video`": "请转换为 JPEG 或 PNG，视频请写在 `video` 里",
    "text: download the image again or remove the row": "文本：请重新下载图片，或删去这一行",
    "download it again or remove the row": "请重新下载，或删去这一行",
    "scale it down or remove the row": "请缩小，或删去这一行",
    "The pictures are no longer here: ask again, then keep the answer.": "图片已经不在了：请重新提问，再保存答案。",
    "{} has half a character (a lone surrogate): write it again.": "{0} 里有半个字符：请重新输入。",
    "The messages show {}; at most {} are taken: leave some out.": "共有 {0}，最多 {1} 张：请减少几张。",
    "The images have {} pixels together; at most {} are taken: send smaller ones.":
        "图片合计 {0} 像素，最多 {1}：请缩小图片。",
    "This model's prompts have no place for all of the images: give fewer.":
        "这个模型的提问放不下全部图片：请减少几张。",
    "{}the conversation takes {} tokens with its images, but the language model reads at most {} with the answer: "
    "shorten it or give fewer images.":
        "{0}对话连同图片有 {1} 个 token，而语言模型连同答案最多读 {2} 个：请缩短，或减少图片。",
    "{} questions wait already: ask again in some seconds.": "已有 {0} 个问题在等：请过几秒再问。",
}  # fmt: skip


DEEPEST = 4
"""Sentences in each other; those of the code are two."""
_COUNTERS = {"row": "行", "picture": "张图片", "image": "张图片", "text": "段文字"}
_COUNTED = re.compile(rf"([\d,]+) ({'|'.join(_COUNTERS)})s?")


_VERBS = ("is ", "has ", "starts ")  # with which begins what is wrong with a picture


def translated(sentence: str, language: Language | None = None) -> str:
    """A sentence in the language that is spoken; as it is, where nobody has put it into that.

    Args:
        sentence: In English; a stranger's name in it may be as long as a file.
        language: Of whoever reads it; None: that of the environment.
    """
    return _in_chinese(sentence) if (language or spoken_language()) == "zh" else sentence


def _in_chinese(sentence: str, within: int = 0) -> str:
    """A sentence, or a piece of as many others as `within` says, in Chinese where somebody has put it into that."""
    if within > DEEPEST:
        return sentence
    if found := _COUNTED.fullmatch(sentence):
        return f"{found[1]} {_COUNTERS[found[2]]}"
    for pieces, chinese in _templates():
        if (filled := _filled(pieces, sentence)) is not None:
            # A piece of one may be a sentence itself.
            return chinese.format(*(_in_chinese(each, within + 1) for each in filled))
    return _of_a_picture(sentence, within)


def _of_a_picture(sentence: str, within: int) -> str:
    """A sentence on a picture, which the code puts together: its name, what is wrong with it, and how to mend it."""
    whole = sentence.removesuffix(".")
    wrong, _, mend = whole.rpartition(": ")
    for pieces, chinese in _templates():
        if pieces[0].startswith(_VERBS):
            for text, rest in ((whole, ""), (wrong, mend)):
                if filled := _filled(["", f" {pieces[0]}", *pieces[1:]], text):
                    name, *others = (_in_chinese(each, within + 1) for each in filled)
                    what = chinese.format(*others) + (rest and "：" + _in_chinese(rest, within + 1))
                    return f"{name.replace('the image ', '图片 ')} {what}。"
    return sentence


def _filled(pieces: list[str], sentence: str) -> list[str] | None:
    """What stands between the pieces of a template in a sentence, each as short as can be; None where it is another.

    It takes a time that grows as the sentence does. A pattern of `(.*?)` takes its fourth power.
    """
    first, *others = pieces
    if not others:
        return [] if sentence == first else None
    *middle, last = others
    if not sentence.startswith(first):
        return None
    filled, at = [], len(first)
    for piece in middle:
        if (found := sentence.find(piece, at)) < 0:
            return None
        filled.append(sentence[at:found])
        at = found + len(piece)
    end = len(sentence) - len(last)
    return [*filled, sentence[at:end]] if end >= at and sentence.endswith(last) else None


@cache
def _templates() -> list[tuple[list[str], str]]:
    """The pieces of each template, those with the most words of their own first: they say the most."""
    order = sorted(CHINESE, key=lambda template: -len(template.replace("{}", "")))
    return [(template.split("{}"), CHINESE[template]) for template in order]
