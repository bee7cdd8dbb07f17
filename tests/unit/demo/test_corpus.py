"""The demo's data set is real text, the same on every call, with refusals where it says they are."""

from tests.demo import corpus, tiny_llama


def test_rows_are_questions_about_names_with_their_documentation_as_answer():
    rows = corpus.make_corpus(500).rows
    assert len(rows) == 500
    assert all(row["instruction"].startswith("What does `") and len(row["output"]) >= 20 for row in rows)
    assert len({row["instruction"] for row in rows}) > 490


def test_the_same_seed_gives_the_same_rows_and_another_gives_others():
    assert corpus.make_corpus(300) == corpus.make_corpus(300)
    assert corpus.make_corpus(300).rows != corpus.make_corpus(300, seed=8).rows


def test_refusals_and_disclaimers_stand_exactly_where_they_were_planted():
    made = corpus.make_corpus(1000)
    spoiled = (*corpus.REFUSALS, *corpus.DISCLAIMERS)
    found = {index for index, row in enumerate(made.rows) if row["output"].startswith(spoiled)}
    assert found == made.planted
    assert len(found) == 40


def test_the_tiny_model_is_the_same_for_the_same_text_and_seed(tmp_path):
    texts = [row["output"] for row in corpus.make_corpus(300).rows]
    shape = tiny_llama.Shape(vocabulary=400, hidden=32, layers=1, heads=2, intermediate=64)
    first = tiny_llama.write_tiny_llama(tmp_path / "a", texts, shape=shape)
    second = tiny_llama.write_tiny_llama(tmp_path / "b", texts, shape=shape)
    assert first == second == 2 * 400 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
