"""Base models in a GGUF file: what is read, a run on one, and files that cannot be used."""

import json

import gguf
import numpy as np
import pytest
import torch
from tiny_run import fails, main, train_command, write_data, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adazeta import UserError
from adazeta.gguf_models import gguf_file, gguf_folder
from adazeta.model_card import hub_name

LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder, path, leave_out=()):
    """Write the Llama of a folder as a GGUF file, matrices in 8 bits; return the float32 numbers that it then holds."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, held = model.config, {}
    names = {
        f"model.layers.{i}.{a}": f"blk.{i}.{b}" for i in range(config.num_hidden_layers) for a, b in LAYERS.items()
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    merged = {"Ā": "Ġa", "ā": "Ġb"}  # in the place of two bytes that no text has
    words = [merged.get(word, word) for word in tokenizer.convert_ids_to_tokens(range(config.vocab_size))]
    added = {token: gguf.TokenType.USER_DEFINED for token in tokenizer.get_added_vocab()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([added.get(word, gguf.TokenType.NORMAL) for word in words])
    writer.add_token_merges(["Ġ a", "Ġ b"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        key, numbers = name.removesuffix(".weight"), tensor.numpy()
        if key in leave_out:
            continue
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(key[-6:-5], 0)
        if heads and key.endswith("_proj"):  # llama.cpp turns pairs that are neighbours
            numbers = numbers.reshape(heads, 2, -1, numbers.shape[1]).swapaxes(1, 2).reshape(numbers.shape)
        stored = {"raw_dtype": gguf.GGMLQuantizationType.Q8_0} if numbers.ndim == 2 else {}
        quantised = gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0) if stored else np.ascontiguousarray(numbers)
        writer.add_tensor(f"{({**names, **OTHERS})[key]}.weight", quantised, **stored)
        rounded = gguf.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0) if stored else tensor.numpy()
        held[name] = gguf.dequantize(rounded, gguf.GGMLQuantizationType.Q8_0) if stored else rounded
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder with ``base`` (a Llama), its GGUF file in a folder of its own, and what that holds."""
    folder = tmp_path_factory.mktemp("gguf")
    write_model(folder / "base", intermediate_size=128)
    (folder / "model").mkdir()
    return folder, write_gguf(folder / "base", folder / "model" / "tiny.gguf")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ADAZETA_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_the_folder_holds_what_the_file_holds(tiny):
    folder, held = tiny
    said = []
    made = gguf_folder(folder / "model" / "tiny.gguf", said.append)
    read = AutoModelForCausalLM.from_pretrained(made).state_dict()
    assert read.keys() == held.keys()
    assert all(torch.equal(tensor, torch.from_numpy(held[name])) for name, tensor in read.items())
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (folder / "base", made)]
    first, second = (tokenizer(["warm film", "é"])["input_ids"] for tokenizer in tokenizers)
    assert first == second and len(tokenizers[1](" a")["input_ids"]) == 1
    assert gguf_folder(folder / "model" / "tiny.gguf", said.append) == made  # not again
    assert len(said) == 2 and "reading tiny.gguf" in said[0]
    (made / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match=r"model.safetensors is not whole: delete .*tiny-\w{16}$"):
        gguf_folder(folder / "model" / "tiny.gguf")


def test_a_run_on_it(tiny, tmp_path, capsys):
    """Trained, asked, replayed, exported: as on the same numbers in a plain folder."""
    folder, _ = tiny
    (tmp_path / "base").symlink_to(folder / "model")
    write_data(tmp_path / "data.jsonl")
    words = ("--label-words", "positive=a,negative=b")
    code, out, err = main(capsys, *train_command(tmp_path, "run", *words))
    assert code == 0 and "reading tiny.gguf" in err, err
    card = json.loads((tmp_path / "run" / "adazeta.json").read_text())
    assert main(capsys, "replay", tmp_path / "run")[0] == 0
    code, out, _ = main(capsys, "predict", tmp_path / "run", "a warm film", "--json", "--threads", 1)
    answer = json.loads(out)
    assert code == 0 and answer["label"] in ("positive", "negative")
    code, asked, _ = main(capsys, "predict", folder / "model" / "tiny.gguf", "a warm film", "--json", "--threads", 1,
                          *words, "--journal", tmp_path / "run")  # fmt: skip
    assert (code, json.loads(asked)["probabilities"]) == (0, answer["probabilities"])
    assert main(capsys, "export", tmp_path / "run", "--to", "low-rank", "--output", tmp_path / "factors")[0] == 0
    assert main(capsys, "info", tmp_path / "base", "--plan")[0] == 0
    code, out, _ = main(capsys, "info", folder / "model" / "tiny.gguf")
    assert code == 0 and "LlamaForCausalLM" in out

    plain = gguf_folder(folder / "model" / "tiny.gguf")
    (tmp_path / "base").unlink()
    (tmp_path / "base").symlink_to(plain)
    code, _, err = main(capsys, *train_command(tmp_path, "again", *words))
    assert code == 0, err
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again"))
    assert first == second and hub_name(card["base_model"]) is None


def test_files_that_are_no_model(tiny, tmp_path, capsys):
    folder, _ = tiny
    whole = (folder / "model" / "tiny.gguf").read_bytes()
    data = ("--data", write_data(tmp_path / "data.jsonl"), "--output", tmp_path / "x")
    path = tmp_path / "cut.gguf"
    for length in (3, 100, len(whole) // 20, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        assert "cut.gguf cannot be read as a language model: " in fails(capsys, "train", "--model", path, *data), length
    path.write_bytes(whole.replace(b"llama", b"camel"))
    assert "cannot be read as a language model: " in fails(capsys, "predict", path, "a film")
    write_gguf(folder / "base", path, leave_out=("model.norm", "model.layers.1.mlp.up_proj"))
    assert "it lacks 2 weights (model.layers.1.mlp.up_proj.weight, model.norm" in fails(capsys, "info", path, "--plan")
    (tmp_path / "other.gguf").write_bytes(whole)
    message = fails(capsys, "train", "--model", tmp_path, *data)
    assert "holds several GGUF files (cut.gguf, other.gguf): name one of them" in message
    assert gguf_file(folder / "base") is None is gguf_file(tmp_path / "nowhere.gguf")
