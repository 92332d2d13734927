#!/usr/bin/env bash
# What `make demo` runs, with the virtual environment's programs on PATH: data, two stages, evaluation, two questions.
# It goes through the same commands that a user types; none of them needs a network or a GPU.
# `make demo` 所运行的内容：生成数据、训练两个阶段、评测、提两个问题。不需要网络，也不需要 GPU。
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly DATA=data/digitscenes STAGE1=outputs/quickstart_stage1 STAGE2=outputs/quickstart_stage2
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that wait do not take a busy machine from those that work

step() { printf '\n== %s\n' "$*"; }

train() { # RECIPE
    accelerate launch --quiet --config_file accelerate_configs/cpu.yaml -m vlm_sft.train "$1"
}

ask() { # IMAGE QUESTION; a process of its own, which loads the bundle from the disk
    local answer
    answer=$(vlm-sft chat "$STAGE2" "$2" --image "$1")
    [[ -n $answer ]] || { echo "The model gave no answer to: $2" >&2; return 1; }
    echo "$answer"
}

for command in python accelerate vlm-sft; do
    command -v "$command" >/dev/null || { echo "There is no command $command: start this with \`make demo\`." >&2; exit 2; }
done

step "1/6 Drawing DigitScenes  生成数据：手写数字组成的小图，配英文和中文的描述与问题"
rm -rf "$STAGE1" "$STAGE2" # of an earlier demo: training never writes over a run
python examples/digitscenes/digitscenes.py --out "$DATA" --seed 0

step "2/6 Stage 1: the projector learns to caption; everything else is frozen  第一阶段：只训练投影层，学习描述图片"
train recipes/quickstart_stage1.yaml

step "3/6 Stage 1 on test images that no piece has ever seen  第一阶段在测试集上的结果"
vlm-sft evaluate "$STAGE1"

step "4/6 Stage 2: projector and LoRA learn to answer questions  第二阶段：训练投影层和 LoRA，学习回答问题"
train recipes/quickstart_stage2.yaml

step "5/6 Stage 2 on the test images  第二阶段在测试集上的结果"
vlm-sft evaluate "$STAGE2"

step "6/6 Two questions about a test image, each asked in a fresh process  在新进程中就一张测试图提两个问题"
# The first English and the first Chinese question about the first test image, with their answers, and what it shows.
mapfile -t asked < <(python - "$DATA" <<'PYTHON'
import json
import sys
from pathlib import Path

data = Path(sys.argv[1])
read = lambda name: [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
captions, questions = read("captions_test.jsonl"), read("questions_test.jsonl")
image = questions[0]["image"]
mine = [row for row in questions if row["image"] == image]
english = next(row for row in mine if row["question"].isascii())
chinese = next(row for row in mine if not row["question"].isascii())
print(data / image, *[row["caption"] for row in captions if row["image"] == image], sep="\n")
print(english["question"], english["answer"], chinese["question"], chinese["answer"], sep="\n")
PYTHON
)
[[ ${#asked[@]} -eq 7 ]] || { echo "The test questions in $DATA cannot be read." >&2; exit 1; }
readonly IMAGE=${asked[0]}
printf '\nImage: %s\nIt shows: %s\n图中内容：%s\n' "$IMAGE" "${asked[1]}" "${asked[2]}"
answer=$(ask "$IMAGE" "${asked[3]}")
printf '\nQuestion: %s\nAnswer:   %s   (right: %s)\n' "${asked[3]}" "$answer" "${asked[4]}"
answer=$(ask "$IMAGE" "${asked[5]}")
printf '\n提问：%s\n回答：%s （正确答案：%s）\n' "${asked[5]}" "$answer" "${asked[6]}"

step "Done  完成"
cat <<END
Bundles   模型：    $STAGE1/ and $STAGE2/, each with a README.md, its model card
Curves    曲线：    $STAGE1/curves.png and $STAGE2/curves.png
Results   评测结果：$STAGE1/eval.json and $STAGE2/eval.json

Go on asking  继续提问：
  .venv/bin/vlm-sft chat $STAGE2 --image $IMAGE
END
