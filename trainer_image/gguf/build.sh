#!/bin/sh
# Builds the GGUF tools: `build.sh SOURCE TARGET`, with SOURCE the unpacked sdist of llama-cpp-python, which carries
# the sources of llama.cpp, and TARGET the folder to make. Needs cmake, g++ and ninja; takes some minutes.
#
#   TARGET/bin                     tunewright-gguf and llama.cpp's libraries
#   TARGET/convert_hf_to_gguf.py   llama.cpp's converter, with conversion/, gguf-py/ and models/templates/
#   TARGET/VERSION, licenses/      release of llama-cpp-python; the licences of what was compiled
set -eu
here=$(cd "$(dirname "$0")" && pwd)
llama_cpp=$(cd "$1" && pwd)/vendor/llama.cpp
target=$2
build=$target.build

cmake -S "$here" -B "$build" -G Ninja -DLLAMA_CPP="$llama_cpp"
cmake --build "$build" --parallel "${JOBS:-$(nproc)}" --target tunewright-gguf

mkdir -p "$target/bin" "$target/models" "$target/gguf-py" "$target/licenses"
cp -a "$build"/bin/* "$target/bin/"
cp -a "$llama_cpp/convert_hf_to_gguf.py" "$llama_cpp/conversion" "$target/"
cp -a "$llama_cpp/gguf-py/gguf" "$target/gguf-py/"
cp -a "$llama_cpp/LICENSE" "$llama_cpp"/licenses/* "$target/licenses/"
sed -n 's/^Version: /llama-cpp-python /p' "$1/PKG-INFO" > "$target/VERSION"
# Chat templates of models whose own files have none.
cp -a "$llama_cpp/models/templates" "$target/models/"
find "$target" -name __pycache__ -prune -exec rm -rf {} +
rm -rf "$build"
"$target/bin/tunewright-gguf" check
