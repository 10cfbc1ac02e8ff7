"""Tokenizers: ids are the published ones, markup in a text is only text, and a saved tokenizer is the same one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csm import text
from csm.text import ByteTokenizer, Llama3Tokenizer, TextTokenizer, WordTokenizer, load_tokenizer, tokenizer_from_folder

WORDS = ("seven", "four", "two", "what", "is", "it")
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>", "<|AUDIO|>")


@pytest.fixture(scope="module")
def words() -> WordTokenizer:
    return WordTokenizer(WORDS, num_speakers=4)


@pytest.fixture(scope="module")
def llama3() -> Llama3Tokenizer:
    pytest.importorskip("llama_models", reason="pip install llama-models brings Llama-3's tokenizer")
    return Llama3Tokenizer()


class TestWords:
    def test_a_turn_is_speaker_and_words_between_bos_and_eos(self, words: WordTokenizer) -> None:
        ids = words.encode_turn(2, "seven four two")
        assert ids[0] == words.bos_id
        assert ids[-1] == words.eos_id
        assert words.decode(ids) == "[2]seven four two"
        assert len(ids) == 6

    def test_ids_do_not_depend_on_the_order_of_the_words(self, words: WordTokenizer) -> None:
        again = WordTokenizer(reversed([*WORDS, "two"]), num_speakers=4)
        assert again.encode("seven four two") == words.encode("seven four two")
        assert again.vocab_size == words.vocab_size == 3 + 4 + len(WORDS)

    @given(st.lists(st.sampled_from(WORDS)), st.integers(0, 3))
    def test_decode_is_the_inverse(self, said: list[str], speaker: int) -> None:
        words = WordTokenizer(WORDS, num_speakers=4)
        ids = words.encode_turn(speaker, " ".join(said))
        assert words.decode(ids) == f"[{speaker}]{' '.join(said)}"
        assert all(0 < i < words.vocab_size for i in ids)

    @pytest.mark.parametrize("said", ["seven eleven", "Seven", "<bos>", "seven <eos>", "[2]", "[", "seven [1] two", "seven, two", "[9]"])
    def test_what_the_model_never_heard_is_refused(self, words: WordTokenizer, said: str) -> None:
        with pytest.raises(ValueError, match="never heard; it knows speakers 0-3 and the words: four is it seven two what"):
            words.encode_turn(0, said)

    def test_an_unknown_speaker_is_refused(self, words: WordTokenizer) -> None:
        with pytest.raises(ValueError, match="speakers 0-3"):
            words.encode_turn(4, "seven")
        with pytest.raises(ValueError, match="speaker -1: expected a number from 0"):
            words.encode_turn(-1, "seven")

    @pytest.mark.parametrize("word", ["[1]", "", "two words", "a[b"])
    def test_a_vocabulary_with_a_word_that_cannot_be_read_back_is_refused(self, word: str) -> None:
        with pytest.raises(ValueError, match="not a word"):
            WordTokenizer([*WORDS, word], num_speakers=2)

    def test_what_is_added_gets_new_ids_and_moves_no_old_one(self, words: WordTokenizer, tmp_path: Path) -> None:
        more = words.with_added(["[4]", "(happy)"]).with_added(["[5]"])
        assert more.vocab_size == words.vocab_size + 3 and more.num_speakers == 6
        assert more.encode_turn(2, "seven four") == words.encode_turn(2, "seven four")
        first = words.vocab_size
        assert more.encode_turn(4, "(happy) four") == [1, first, first + 1, *words.encode("four"), 2]
        assert more.speaker_id(5) == first + 2
        assert more.decode(more.encode_turn(5, "(happy) four")) == "[5](happy) four"
        more.save(tmp_path)
        assert tokenizer_from_folder(tmp_path).encode_turn(5, "(happy)") == more.encode_turn(5, "(happy)")

    @pytest.mark.parametrize(
        ("pieces", "named"), [(["[5]"], r"next speaker, \[4\]"), (["a b"], "not a word"), (["seven"], "not there yet")]
    )
    def test_what_cannot_be_added_is_refused(self, words: WordTokenizer, pieces: list[str], named: str) -> None:
        with pytest.raises(ValueError, match=named):
            words.with_added(pieces)


class TestBytes:
    @given(st.text())
    def test_any_text_is_read_back(self, said: str) -> None:
        tokenizer = ByteTokenizer()
        ids = tokenizer.encode_turn(0, said)
        assert tokenizer.decode(ids) == f"[0]{said}"
        assert (ids[0], ids[-1]) == (256, 257)
        assert max(ids[1:-1]) < 256

    def test_ids_are_utf8(self) -> None:
        assert ByteTokenizer().encode("é") == [0xC3, 0xA9]

    def test_ids_without_a_byte_are_left_out(self) -> None:
        assert ByteTokenizer().decode([256, 72, 105, 257]) == "Hi"


class TestLlama3:
    def test_a_turn_stands_between_the_published_bos_and_eos(self, llama3: Llama3Tokenizer) -> None:
        ids = llama3.encode_turn(0, "Hello from Sesame.")
        assert (ids[0], ids[-1]) == (128_000, 128_001)
        assert llama3.vocab_size == 128_256
        assert llama3.decode(ids) == "[0]Hello from Sesame."

    @pytest.mark.parametrize(
        ("said", "ids"),
        [  # known of Llama 3's vocabulary: the 256 bytes come first, and these are its published ids
            ("!", [0]),
            ("a", [64]),
            ("Hello", [9906]),
            ("Hello world", [9906, 1917]),
            (" the", [279]),
            ("[0]", [58, 15, 60]),
            ("123456", [4513, 10961]),
        ],
    )
    def test_ids_are_llama3s(self, llama3: Llama3Tokenizer, said: str, ids: list[int]) -> None:
        assert llama3.encode(said) == ids

    @pytest.mark.parametrize("markup", LLAMA3_SPECIALS)
    def test_markup_is_plain_text(self, llama3: Llama3Tokenizer, markup: str) -> None:
        ids = llama3.encode(f"say {markup} now")
        assert max(ids) < text.NUM_LLAMA3_BASE_TOKENS
        assert llama3.decode(ids) == f"say {markup} now"
        assert [i for i in llama3.encode_turn(0, markup) if i >= text.NUM_LLAMA3_BASE_TOKENS] == [128_000, 128_001]

    @given(said=st.text())
    def test_any_text_is_read_back_and_never_holds_a_special(self, said: str) -> None:
        tokenizer = _llama3_once()
        ids = tokenizer.encode(said)
        assert tokenizer.decode(ids) == said
        assert all(0 <= i < text.NUM_LLAMA3_BASE_TOKENS for i in ids)

    def test_a_file_that_is_not_llama3s_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(b"IQ== 0\nIg== 1\n")
        with pytest.raises(ValueError, match=f"{path}: 2 pieces, Llama-3 has 128000"):
            Llama3Tokenizer(str(path))

    def test_another_models_tokenizer_is_refused(self, tmp_path: Path) -> None:
        """Same number of pieces, other ids: only a known answer tells."""
        path = tmp_path / "tokenizer.model"
        lines = Path(str(text.packaged_llama3())).read_bytes().splitlines()
        pieces = [line.split()[0] for line in lines]
        path.write_bytes(b"".join(b"%s %d\n" % (piece, i) for i, piece in enumerate(pieces[:256] + pieces[:255:-1])))
        with pytest.raises(ValueError, match="Llama-3 as \\[9906, 1917\\]"):
            Llama3Tokenizer(str(path))

    @pytest.mark.slow  # converting the vocabulary takes 20 s
    def test_a_hub_folder_gives_the_same_ids(self, llama3: Llama3Tokenizer, tmp_path: Path) -> None:
        """transformers' form of the same vocabulary, converted here, with its specials switched on."""
        _write_transformers_form(tmp_path)
        from_hub_form = Llama3Tokenizer(str(tmp_path))
        for said in ("Hello world", "[0]I'll say 1234567,  twice\n\n — naïve 你好", *LLAMA3_SPECIALS):
            assert from_hub_form.encode(said) == llama3.encode(said)
            assert from_hub_form.decode(llama3.encode_turn(1, said)) == f"[1]{said}"

    def test_a_source_without_a_tokenizer_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="pip install llama-models"):
            Llama3Tokenizer(str(tmp_path / "nowhere"))


_cache: list[Llama3Tokenizer] = []


def _llama3_once() -> Llama3Tokenizer:
    """For hypothesis, which calls a test many times and takes no function fixtures."""
    pytest.importorskip("llama_models")
    if not _cache:
        _cache.append(Llama3Tokenizer())
    return _cache[0]


def _write_transformers_form(folder: Path) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    converter = TikTokenConverter(
        vocab_file=str(text.packaged_llama3()),
        pattern=text._LLAMA3_PATTERN,
        extra_special_tokens=list(LLAMA3_SPECIALS),
    )
    converter.converted().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("tokenizer", [WordTokenizer(WORDS, 3), ByteTokenizer()], ids=["words", "bytes"])
def test_a_saved_tokenizer_is_the_same_one(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = tokenizer_from_folder(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.settings() == tokenizer.settings()
    assert again.encode_turn(1, "seven two") == tokenizer.encode_turn(1, "seven two")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_saved_llama3_tokenizer_is_the_same_one(llama3: Llama3Tokenizer, tmp_path: Path) -> None:
    llama3.save(tmp_path)
    assert tokenizer_from_folder(tmp_path).encode_turn(0, "Hello") == llama3.encode_turn(0, "Hello")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": "words"}', '{"version": "1.0", "model": {}}'])
def test_a_foreign_tokenizer_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not one of our tokenizer files"):
        tokenizer_from_folder(tmp_path)


def test_a_missing_tokenizer_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no tokenizer there"):
        tokenizer_from_folder(tmp_path)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="text.tokenizer='bpe': expected words, bytes or llama3"):
        load_tokenizer("bpe")


def test_words_need_a_folder() -> None:
    with pytest.raises(ValueError, match="needs text.source"):
        load_tokenizer("words")
