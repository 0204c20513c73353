"""Models are loaded whole or refused in a sentence, and their digests change exactly when they do."""

import json
import shutil
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from distilllens import model_source
from distilllens.model_source import local_path, source_kind
from distilllens.models import config_digest, load_model, load_tokenizer
from distilllens.quiet import quiet_libraries
from distilllens.weights_digest import weights_digest

TOKENS = torch.arange(3, 23)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture
def folder(tiny_model_folder, tmp_path: Path) -> Path:
    """A model folder of its own for each test, to break."""
    return Path(shutil.copytree(tiny_model_folder("llama"), tmp_path / "model"))


@pytest.fixture
def adapter(tiny_model_folder, tmp_path: Path) -> Path:
    return write_adapter(tiny_model_folder("llama"), tmp_path / "adapter")


def write_adapter(base: Path, target: Path, *, alpha: int = 8) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(load_model(base), settings).save_pretrained(target)
    return target


# Where it comes from ------------------------------------------------------------------------------


def test_each_kind_of_source_is_recognised(folder, adapter, tmp_path):
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    kinds = [source_kind(source) for source in (folder, adapter, tmp_path / "some.gguf", "gpt2", "owner/name")]
    assert kinds == ["folder", "adapter", "gguf", "hub", "hub"]


@pytest.mark.parametrize("source", ["./absent", "a/b/c", "/absent/model", "absent.gguf", "two words"])
def test_a_missing_path_is_not_taken_for_a_hub_id(source):
    with pytest.raises(ValueError, match=r"does not exist: (expected a model folder|give the path)"):
        load_model(source)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"rows.jsonl is a file, not a model"):
        load_model(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("load", [load_model, load_tokenizer, weights_digest])
def test_an_unknown_hub_id_without_network_fails_at_once(load, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    model_source.hub_is_reachable.cache_clear()
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"nobody/no-such-model is no folder here.*cannot be reached"):
        load("nobody/no-such-model")
    assert time.monotonic() - started < 10
    model_source.hub_is_reachable.cache_clear()


def test_a_hub_model_in_the_local_cache_is_used_without_network(folder, tmp_path, monkeypatch):
    commit, repository = "0" * 40, tmp_path / "hub" / "models--owner--name"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(logits(load_model("owner/name")), logits(load_model(folder)))
    assert load_tokenizer("owner/name").get_vocab() == load_tokenizer(folder).get_vocab()
    assert weights_digest("owner/name") == weights_digest("owner/name", commit) == weights_digest(folder)
    with pytest.raises(ValueError, match="owner/name@other"):
        load_model("owner/name", revision="other")


def test_a_revision_of_a_local_folder_is_refused(folder):
    with pytest.raises(ValueError, match="revisions belong to hub ids"):
        load_model(folder, revision="main")


# Folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_as_it_was(architecture, tied, tiny_model, tmp_path):
    model = tiny_model(architecture, tied=tied)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(module.training for module in loaded.modules())
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied


def test_the_dtype_is_the_one_asked_for(folder):
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    load_model(folder, dtype="float16").save_pretrained(folder)
    assert load_model(folder, dtype="auto").dtype == torch.float16
    assert load_model(folder).dtype == torch.float32


def test_a_folder_without_config_is_refused_with_what_it_holds(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json: expected a model folder.*found .*model.safetensors"):
        load_model(folder)


def test_missing_weights_are_refused_and_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .* model.layers.1.mlp.up_proj.weight"):
        load_model(folder)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _other_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _no_language_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


@pytest.mark.parametrize("damage", [_no_weights, _cut_weights, _other_width, _broken_config, _no_language_model])
def test_a_damaged_folder_is_refused_in_one_sentence(folder, damage, capfd):
    damage(folder)
    with pytest.raises(ValueError, match="could not be loaded as a model: ") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr().out == ""


def test_a_folder_without_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer: expected tokenizer.json"):
        load_tokenizer(folder)


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ValueError, match="could not be loaded as a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dtype": "int3"}, "dtype 'int3' is not known"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"device": "cuda:x"}, "device 'cuda:x' is not known"),
        ({"device": "cuda:99"}, "--device cuda:99: this machine has"),
        ({"attn_implementation": "magic"}, "could not be loaded as a model"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(folder, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_model(folder, **wrong)


def test_a_gguf_file_of_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert source_kind("wheel:some_wheel") == "gguf"
    assert local_path("wheel:some_wheel") == package / "model.gguf"
    for name in ("no_such_wheel", "json", "../x"):
        with pytest.raises(ValueError, match=f"no package {name} with a .gguf file is installed"):
            load_model(f"wheel:{name}")


# Adapters -----------------------------------------------------------------------------------------


def test_an_adapter_is_merged_into_its_base(adapter, tiny_model_folder, tmp_path):
    from peft import PeftModel

    base = load_model(tiny_model_folder("llama"))
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(adapter)))
    merged = load_model(adapter)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_model(tmp_path / "merged")), logits(merged))


def test_an_adapter_has_its_bases_tokenizer_unless_it_brings_one(adapter, tiny_chat_tokenizer):
    assert load_tokenizer(adapter).chat_template is None
    tiny_chat_tokenizer.save_pretrained(adapter)
    assert load_tokenizer(adapter).chat_template is not None


def _base_moved(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/moved/away"}))


def _no_base(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def _own_base(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(adapter)}))


def _no_adapter_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def _half_the_adapter(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}
    save_file(kept, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_base_moved, r"is an adapter of /moved/away, which can't be loaded: /moved/away does not exist"),
        (_no_base, r"names no base model"),
        (_own_base, r"names no base model"),
        (_no_adapter_weights, r"could not be loaded as an adapter"),
        (_half_the_adapter, r"could not be loaded as an adapter: Found missing adapter keys"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, damage, sentence):
    damage(adapter)
    with pytest.raises(ValueError, match=sentence):
        load_model(adapter)


# Digests ------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_byte_of_the_weights_is_in_the_digest(tiny_model_folder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped") / "model"
    shutil.copytree(tiny_model_folder("llama"), folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "model.safetensors").write_bytes(content)
    assert weights_digest(folder) != weights_digest(tiny_model_folder("llama"))


def test_the_weights_digest_ignores_where_they_lie_and_what_lies_beside(folder, tiny_model_folder):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "training_args.bin").write_bytes(b"arguments")
    (folder / "README.md").write_text("a model")
    assert weights_digest(folder) == weights_digest(tiny_model_folder("llama"))


def test_a_folder_of_pickled_weights_is_loaded_and_digested_without_its_neighbours(folder):
    expected = logits(load_model(folder))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    before = weights_digest(folder)
    (folder / "training_args.bin").write_bytes(b"arguments")
    assert weights_digest(folder) == before
    assert torch.equal(logits(load_model(folder)), expected)


def test_an_adapters_digest_covers_its_settings_its_weights_and_its_base(folder, tmp_path):
    adapter = write_adapter(folder, tmp_path / "one")
    moved = shutil.copytree(folder, tmp_path / "moved base")
    digests = {
        "adapter": weights_digest(adapter),
        "scaled": weights_digest(write_adapter(folder, tmp_path / "two", alpha=16)),
        "base": weights_digest(folder),
    }
    other = load_model(folder)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(folder)
    digests["other base"] = weights_digest(adapter)
    assert len(set(digests.values())) == 4
    assert weights_digest(write_adapter(moved, tmp_path / "three")) == digests["adapter"]


def test_a_folder_without_weights_has_no_digest(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        weights_digest(folder)


def test_the_config_digest_is_of_the_function_and_not_of_its_surroundings(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "somewhere")
    same = [
        load_model(tmp_path / "somewhere"),
        load_model(tmp_path / "somewhere", dtype="bfloat16", attn_implementation="eager"),
    ]
    others = [
        tiny_model("llama", num_layers=3),
        tiny_model("llama", tied=True),
        tiny_model("llama", rms_norm_eps=1e-3),
        tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ]
    assert {config_digest(model)} == {config_digest(one) for one in same}
    assert len({config_digest(one) for one in [model, *others]}) == 5


# Libraries ----------------------------------------------------------------------------------------


def test_what_libraries_say_stays_out_of_stdout_and_their_bars_out_of_logs(capsys):
    with quiet_libraries():
        print("a note")
        print("a bar", file=sys.stderr)
    print("a result")
    assert capsys.readouterr() == ("a result\n", "a note\n")
