"""The lens reads hidden states as the model itself would."""

import pytest
import torch

from distilllens.lens import LogitLens, check_lens, decoder_of, final_norm_of

SPECIAL_HEADS = {
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "phi": {"num_key_value_heads": 4},  # a head with a bias
}
ALL = ("llama", "gpt2", "qwen2", *SPECIAL_HEADS)


def build(tiny_model, architecture: str, **settings):
    model = tiny_model(architecture, **SPECIAL_HEADS.get(architecture, {}), **settings)
    if architecture == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("lens_norm", ["final", "none"])
@pytest.mark.parametrize("architecture", ALL)
def test_the_lens_on_the_last_block_gives_the_models_own_logits(tiny_model, architecture: str, lens_norm: str) -> None:
    model = build(tiny_model, architecture)
    lens = LogitLens(model, lens_norm=lens_norm, vocab_size=320)
    ids = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = model(input_ids=ids).logits
        hidden = lens.hidden_states(ids, None, [lens.num_layers])[lens.num_layers]
        assert torch.equal(lens.logits(hidden, lens.num_layers), own)
    check_lens(model, lens)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_a_lens_layer_is_read_with_the_norms_own_statistics_of_that_layer(
    tiny_model, architecture: str, tied: bool
) -> None:
    model = tiny_model(architecture, tied=tied)
    seen = {}
    blocks = decoder_of(model).h if architecture == "gpt2" else decoder_of(model).layers
    blocks[1].register_forward_hook(lambda m, i, out: seen.update(out=out[0] if isinstance(out, tuple) else out))
    ids = torch.arange(7)[None]
    final, none = (LogitLens(model, lens_norm=norm, vocab_size=320) for norm in ("final", "none"))
    with torch.no_grad():
        hidden = final.hidden_states(ids, None, [2, 4])[2]
        assert torch.equal(hidden, seen["out"])
        head = model.get_output_embeddings()
        torch.testing.assert_close(final.logits(hidden, 2), head(final_norm_of(decoder_of(model))(seen["out"])))
        torch.testing.assert_close(none.logits(hidden, 2), head(seen["out"]))


def test_rows_beyond_the_effective_vocabulary_are_left_out_before_the_softmax(tiny_model) -> None:
    model = tiny_model("llama")
    lens = LogitLens(model, lens_norm="final", vocab_size=300)
    logits = lens.head(torch.randn(3, 32))
    assert logits.shape == (3, 300)
    check_lens(model, lens)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_gradient_checkpointing_changes_no_gradient_through_lens_layers(tiny_model, architecture: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(architecture)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        lens = LogitLens(model, lens_norm="final", vocab_size=320)
        hidden = lens.hidden_states(torch.arange(12).view(2, 6), None, [1, 2, 4])
        sum(lens.logits(states, layer).logsumexp(-1).sum() for layer, states in hidden.items()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], msg=name)


def test_a_head_with_a_step_that_the_lens_does_not_know_is_refused(tiny_model) -> None:
    model = tiny_model("granite", logits_scaling=4.0)
    lens = LogitLens(model, lens_norm="final", vocab_size=320)
    lens._scale = 1.0
    with pytest.raises(ValueError, match="differs from the model's own logits"):
        check_lens(model, lens)


def test_a_bfloat16_model_is_read_with_float32_logits(tiny_model) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    lens = LogitLens(model, lens_norm="final", vocab_size=320)
    normed = torch.randn(4, 32).to(torch.bfloat16)
    exact = normed.double() @ model.lm_head.weight.double().T
    assert lens.head(normed).dtype == torch.float32
    assert (lens.head(normed).double() - exact).abs().max() < 1e-5
