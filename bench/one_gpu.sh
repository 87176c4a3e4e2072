#!/usr/bin/env bash
# All that docs/ says was not measured on a GPU, in one go, without network:
#
#   bash bench/one_gpu.sh MODEL TASKS.jsonl HELDOUT.jsonl OUT
#
# MODEL: the directory of a chat model that is the agent and the human (Qwen2.5-Coder-0.5B-Instruct fits any GPU).
# TASKS, HELDOUT: ColBench's backend files, to train on and to evaluate on. Needs requirements-dev.txt in the Python that
# runs (PYTHON, else python). OUT gets tests.txt (the kernels' tests, on the GPU), bench.md (the head against its peers),
# run/ (all stages, preset one-gpu) and stages.txt: seconds, tokens a second, share of the peak and GiB of each stage, to
# set beside docs/memory.md. A part that fails says so in its file, and the others go on; the same command goes on with a
# run that was stopped.
set -u
model=$1 tasks=$2 heldout=$3 out=$4
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
mkdir -p "$out"
part() {  # part FILE COMMAND...: its output goes to OUT/FILE
  local file=$out/$1
  shift
  echo "one_gpu: $*" >&2
  "$@" >"$file" 2>"$file.err" || echo "failed (exit $?): $(tail -n 1 "$file.err")" >>"$file"
}
flags=(--run "$out/run" --preset one-gpu --model "$model" --human "$model" --tasks "$tasks" --heldout "$heldout")
part device.txt nvidia-smi
part tests.txt "$python" -m pytest --all tests/test_kernels.py tests/test_losses.py
part bench.md "$python" -m bench.gpu
part before.txt "$python" sweet.py eval --run "$out/before" --preset one-gpu --model "$model" --human "$model" \
  --heldout "$heldout" --eval-methods base
part table.txt "$python" sweet.py all "${flags[@]}"
part without-c.txt "$python" sweet.py all "${flags[@]}" --critic without-c
part untrained.txt "$python" sweet.py all "${flags[@]}" --critic untrained
part stages.txt "$python" sweet.py status --run "$out/run"
