// What the trainer needs of llama.cpp besides its converter:
//
//   tunewright-gguf check                                    exit code 0 if it runs on this CPU
//   tunewright-gguf quantize INPUT OUTPUT FILE_TYPE THREADS  llama.cpp's own quantization; FILE_TYPE as in llama_ftype
//   tunewright-gguf describe FILE                            what stands in the header, as JSON
//   tunewright-gguf evaluate FILE THREADS LOGITS TEXT        run the model on a text; tokens as JSON, the logits of
//                                                            every position as float32 into the file LOGITS
//
// Results go to stdout, llama.cpp's warnings and errors to stderr. Exit code 2: wrong use or CPU; 1: anything else.

#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <nlohmann/json.hpp>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using json = nlohmann::ordered_json;

namespace {

constexpr int MAX_TOKENS = 256;

bool cpu_is_supported() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
    return true;
#endif
}

void log_line(ggml_log_level level, const char * text, void *) {
    // A continued line has the level of its beginning.
    static ggml_log_level line_level = GGML_LOG_LEVEL_NONE;
    if (level != GGML_LOG_LEVEL_CONT) {
        line_level = level;
    }
    if (line_level >= GGML_LOG_LEVEL_WARN) {
        std::fputs(text, stderr);
    }
}

void quantize(const char * input, const char * output, int file_type, int threads) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = static_cast<llama_ftype>(file_type);
    params.nthread = threads;
    if (llama_model_quantize(input, output, &params) != 0) {
        throw std::runtime_error("llama.cpp could not quantize the file");
    }
}

json text_of(const gguf_context * file, const char * key) {
    const int64_t id = gguf_find_key(file, key);
    if (id < 0 || gguf_get_kv_type(file, id) != GGUF_TYPE_STRING) {
        return nullptr;
    }
    return gguf_get_val_str(file, id);
}

json describe(const char * path) {
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> file(
        gguf_init_from_file(path, {/*no_alloc=*/true, /*ctx=*/nullptr}), gguf_free);
    if (!file) {
        throw std::runtime_error("llama.cpp cannot read the header");
    }
    const int64_t file_type = gguf_find_key(file.get(), "general.file_type");
    json tensors = json::array();
    for (int64_t i = 0; i < gguf_get_n_tensors(file.get()); i++) {
        const int64_t * shape = gguf_get_tensor_ne(file.get(), i);
        tensors.push_back({
            {"name", gguf_get_tensor_name(file.get(), i)},
            {"type", ggml_type_name(gguf_get_tensor_type(file.get(), i))},
            {"elements", shape[0] * shape[1] * shape[2] * shape[3]},
            {"bytes", gguf_get_tensor_size(file.get(), i)},
        });
    }
    return {
        {"architecture", text_of(file.get(), "general.architecture")},
        {"name", text_of(file.get(), "general.name")},
        {"fileType", file_type < 0 ? json(nullptr) : json(gguf_get_val_u32(file.get(), file_type))},
        {"chatTemplate", text_of(file.get(), "tokenizer.chat_template")},
        {"tensors", tensors},
    };
}

std::vector<llama_token> tokenize(const llama_vocab * vocab, const std::string & text) {
    std::vector<llama_token> tokens(MAX_TOKENS);
    const int count = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(),
                                     /*add_special=*/true, /*parse_special=*/true);
    if (count <= 0) {
        throw std::runtime_error("the text has no tokens, or more than " + std::to_string(MAX_TOKENS));
    }
    tokens.resize(count);
    return tokens;
}

json evaluate(const char * path, int threads, const char * logits_path, const std::string & text) {
    llama_model_params model_params = llama_model_default_params();
    // Pages of the file that are not needed any more can be dropped, so that the model need not fit into memory.
    model_params.load_mode = LLAMA_LOAD_MODE_MMAP;
    model_params.use_extra_bufts = false;
    model_params.n_gpu_layers = 0;
    const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
        llama_model_load_from_file(path, model_params), llama_model_free);
    if (!model) {
        throw std::runtime_error("llama.cpp cannot load the model");
    }
    if (llama_model_has_encoder(model.get()) || !llama_model_has_decoder(model.get())) {
        throw std::runtime_error("the model is no decoder");
    }
    const llama_vocab * vocab = llama_model_get_vocab(model.get());
    const std::vector<llama_token> tokens = tokenize(vocab, text);

    llama_context_params context_params = llama_context_default_params();
    context_params.n_ctx = MAX_TOKENS;
    context_params.n_batch = MAX_TOKENS;
    context_params.n_ubatch = MAX_TOKENS;
    context_params.n_threads = threads;
    context_params.n_threads_batch = threads;
    const std::unique_ptr<llama_context, decltype(&llama_free)> context(
        llama_init_from_model(model.get(), context_params), llama_free);
    if (!context) {
        throw std::runtime_error("llama.cpp cannot make a context for the model");
    }
    llama_batch batch = llama_batch_init(tokens.size(), /*embd=*/0, /*n_seq_max=*/1);
    batch.n_tokens = tokens.size();
    for (int i = 0; i < batch.n_tokens; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    const int failed = llama_decode(context.get(), batch);
    llama_batch_free(batch);
    if (failed != 0) {
        throw std::runtime_error("llama.cpp cannot evaluate the model");
    }
    const int vocabulary = llama_vocab_n_tokens(vocab);
    std::ofstream logits;
    logits.exceptions(std::ofstream::failbit | std::ofstream::badbit);
    logits.open(logits_path, std::ios::binary);
    for (size_t i = 0; i < tokens.size(); i++) {
        logits.write(reinterpret_cast<const char *>(llama_get_logits_ith(context.get(), i)), vocabulary * sizeof(float));
    }
    logits.close();
    return {{"tokens", tokens}, {"vocabulary", vocabulary}};
}

int usage() {
    std::cerr << "usage: tunewright-gguf check | quantize INPUT OUTPUT FILE_TYPE THREADS | describe FILE"
                 " | evaluate FILE THREADS LOGITS TEXT\n";
    return 2;
}

int run(int count, char ** arguments) {
    const std::string command = count > 1 ? arguments[1] : "";
    if (!cpu_is_supported()) {
        std::cerr << "this CPU lacks AVX2, FMA or BMI2\n";
        return 2;
    }
    llama_log_set(log_line, nullptr);
    if (command == "check" && count == 2) {
        return 0;
    }
    if (command == "quantize" && count == 6) {
        quantize(arguments[2], arguments[3], std::atoi(arguments[4]), std::atoi(arguments[5]));
        return 0;
    }
    if (command == "describe" && count == 3) {
        std::cout << describe(arguments[2]).dump() << std::endl;
        return 0;
    }
    if (command == "evaluate" && count == 6) {
        std::cout << evaluate(arguments[2], std::atoi(arguments[3]), arguments[4], arguments[5]).dump() << std::endl;
        return 0;
    }
    return usage();
}

}  // namespace

int main(int count, char ** arguments) {
    try {
        return run(count, arguments);
    } catch (const std::exception & error) {
        std::cerr << "tunewright-gguf: " << error.what() << std::endl;
        return 1;
    }
}
