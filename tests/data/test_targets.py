"""Targets of labelled words and of prompts with answers."""

from hypothesis import given
from hypothesis import strategies as st

from fedspine_edge.data.targets import IGNORED, first_tokens, truncate_prompt_and_answer, word_targets


def test_first_token_carries_the_label_of_its_word():
    words = [None, 0, 0, 1, 2, 2, None]  # [CLS] film ##s are good ##ish [SEP]
    assert first_tokens(words) == {0: 1, 1: 3, 2: 4}
    assert word_targets(words, [7, 8, 9]) == [IGNORED, 7, IGNORED, 8, 9, IGNORED, IGNORED]


def test_word_without_token_or_truncated_is_absent():
    assert first_tokens([None, 0, 2, None]) == {0: 1, 2: 2}
    assert word_targets([None, 0, 2, None], [7, 8, 9, 5]) == [IGNORED, 7, 9, IGNORED]


@given(st.lists(st.integers(0, 3), max_size=20))
def test_every_word_with_tokens_has_exactly_one_target(counts):
    words = [word for word, count in enumerate(counts) for _ in range(count)]
    targets = word_targets(words, range(100, 100 + len(counts)))
    assert [target for target in targets if target != IGNORED] == [100 + w for w, count in enumerate(counts) if count]


@given(st.integers(1, 12), st.integers(0, 12), st.integers(2, 12))
def test_prompt_loses_its_beginning_and_answer_its_end(prompts, answers, limit):
    prompt, answer = list(range(prompts)), list(range(100, 100 + answers))
    kept, answered = truncate_prompt_and_answer(prompt, answer, limit)
    assert len(kept) + len(answered) == min(limit, prompts + min(answers, limit - 1))
    assert kept == prompt[prompts - len(kept) :]
    assert answered == answer[: len(answered)]
    assert kept
    assert len(answered) == min(answers, limit - 1)
