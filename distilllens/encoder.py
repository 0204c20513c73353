"""Text to token ids, and which of them are to be learnt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from distilllens.records import Reason, Unusable
from distilllens.template import Rendered


class Encoder:
    """A tokenizer that adds nothing by itself: what comes before and after a text is added by name, once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.bos = _leading_specials(tokenizer)
        """What the tokenizer puts in front of every text: the token for its beginning, or nothing."""
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = cast(list[int], tokenizer.all_special_ids)
        self.ends = frozenset({*special, *named} - {cast(int | None, tokenizer.unk_token_id)})
        """Special tokens, of which one ends a turn."""
        self._shared = list(range(max(tokenizer.get_vocab().values()) + 1))

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Token ids of each text, without anything in front or behind."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        encoded = self.tokenizer(
            distinct,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text longer than the model's context is cut later, and that is counted
        )
        return dict(zip(distinct, encoded["input_ids"], strict=True))

    def begin(self, token_ids: list[int]) -> list[int]:
        """``token_ids`` behind what the tokenizer puts in front of a text, unless the text wrote it itself.

        Rows that were rendered with a chat template beforehand do; a doubled beginning would be learnt.
        """
        return token_ids if token_ids[: len(self.bos)] == self.bos else self.bos + token_ids

    def end(self, token_ids: list[int]) -> list[int]:
        """``token_ids`` with the end-of-text token, unless the text wrote it itself."""
        eos = cast(int | None, self.tokenizer.eos_token_id)
        if eos is None:
            raise ValueError(
                "the tokenizer has no end-of-text token (eos_token), so a response cannot be ended: "
                "set one, or give a chat template (--template FILE) that ends each turn"
            )
        return token_ids if token_ids[-1:] == [eos] else [*token_ids, eos]

    def end_of_turn(self, token_ids: list[int], start: int) -> int:
        """Where the turn in ``token_ids[start:]`` ends: behind its end token, if only white space follows.

        ChatML writes a newline behind ``<|im_end|>``. It belongs to the layout of the next turn: generation
        has stopped by then, so nobody has to predict it. A turn without an end token is taken whole.
        """
        stop = len(token_ids)
        while stop > start and token_ids[stop - 1] not in self.ends:
            stop -= 1
        only_space_follows = not str(self.tokenizer.decode(token_ids[stop:])).strip()
        return stop if stop > start and only_space_follows else len(token_ids)

    def shared(self, token_ids: Sequence[int]) -> list[int]:
        """The same token ids, as integers that all examples share."""
        assert max(token_ids, default=0) < len(self._shared), "a token id beyond the tokenizer's vocabulary"
        return [self._shared[token] for token in token_ids]


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def tokenize(rendered: Rendered, tokens: Mapping[str, list[int]], encoder: Encoder) -> tuple[list[int], list[bool]]:
    """Token ids of a row and which of them are to be learnt; nothing follows the last of these."""
    if rendered.has_specials:
        return _tokenize_chat(rendered, tokens, encoder)
    before, _ = rendered.responses[0]
    prompt, whole = tokens[before], tokens[rendered.whole]
    if whole[: len(prompt)] != prompt:
        # A token spans the border. A model is given the prompt alone, so the prompt keeps its own tokens and
        # the response gets its own. The released recipe cuts at the prompt's length all the same.
        response = rendered.whole[len(before) :]
        whole = prompt + encoder.encode([response])[response]
    num_learnt = len(whole) - len(prompt)
    if num_learnt == 0:
        raise Unusable(Reason.EMPTY_TEXT if rendered.is_text else Reason.EMPTY_RESPONSE, "it has no tokens")
    if num_learnt == 1 and rendered.is_text:
        raise Unusable(Reason.ONE_TOKEN)
    ended = encoder.end(whole)
    token_ids = encoder.begin(ended)
    num_given = len(token_ids) - len(ended) + len(prompt)
    return token_ids, [position >= num_given for position in range(len(token_ids))]


def _tokenize_chat(
    rendered: Rendered, tokens: Mapping[str, list[int]], encoder: Encoder
) -> tuple[list[int], list[bool]]:
    whole = tokens[rendered.whole]
    is_supervised = [False] * len(whole)
    last = 0
    for before, upto in rendered.responses:
        start, stop = len(tokens[before]), len(tokens[upto])
        if whole[:start] != tokens[before] or whole[:stop] != tokens[upto] or stop <= start:
            raise Unusable(Reason.NOT_PREFIX)
        last = encoder.end_of_turn(whole[:stop], start)
        is_supervised[start:last] = [True] * (last - start)
    return whole[:last], is_supervised[:last]
