"""Step times: the formula, and the table against figures it was not fitted to by hand."""

import pytest

from engine.step_time import STEP_TIMES, StepWork, step_time


def prefill(tokens: int, cached: int = 0) -> StepWork:
    return StepWork(prefill_tokens=tokens, prefill_pairs=(cached + tokens) ** 2 - cached**2)


def decode(batch: int, context: int) -> StepWork:
    return StepWork(decodes=batch, context_tokens=batch * context)


@pytest.mark.parametrize(
    ("work", "table_ms"),
    [
        (prefill(1024), 51),
        (prefill(4096), 191),
        (prefill(8192), 380),
        (prefill(32768), 1911),
        (prefill(512, cached=16384), 35),
        (decode(64, 2048), 12.6),
        (decode(64, 8192), 17.5),
        (decode(256, 2048), 25.6),
        (decode(256, 8192), 46.2),
    ],
)
def test_a_row_is_near_the_measured_kernels_it_was_fitted_to(work: StepWork, table_ms: float) -> None:
    assert step_time("h200-llama-3-70b-fp8-tp4").step_s(work) * 1e3 == pytest.approx(table_ms, rel=0.08)


@pytest.mark.parametrize("name", STEP_TIMES)
def test_more_work_never_takes_less_time(name: str) -> None:
    row = STEP_TIMES[name]
    steps = [
        StepWork(),
        decode(1, 1),
        decode(8, 100),
        StepWork(prefill_tokens=1, prefill_pairs=1, decodes=8, context_tokens=800),
        StepWork(prefill_tokens=2048, prefill_pairs=2048**2, decodes=8, context_tokens=800),
        StepWork(prefill_tokens=2048, prefill_pairs=8192**2, decodes=256, context_tokens=256 * 8192),
    ]
    times = [row.step_s(work) for work in steps]
    assert times == sorted(times)
    assert times[0] == 0
    assert 0.001 < times[1] < 0.1


def test_chunks_of_a_prompt_cost_the_attention_of_the_whole() -> None:
    row = step_time("h100-llama-3-70b-tp4")
    chunks = [prefill(2048, cached=start) for start in range(0, 8192, 2048)]
    assert sum(chunk.prefill_pairs for chunk in chunks) == prefill(8192).prefill_pairs
    weights_read_again = 3 * row.prefill_ms / 1e3
    assert sum(map(row.step_s, chunks)) == pytest.approx(row.step_s(prefill(8192)) + weights_read_again)


def test_experts_are_read_once_all_are_reached() -> None:
    row = step_time("h200-deepseek-v3-fp8-tp8")
    per_sequence = row.decode_ms_per_sequence + row.decode_ms_per_context_token
    few, many = (row.step_s(decode(batch, 1)) * 1e3 - batch * per_sequence for batch in (1, 256))
    assert few == pytest.approx(14.92 + 17.50 * 8 / 256)
    assert many == pytest.approx(14.92 + 17.50, rel=0.01)


def test_an_unknown_row_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"no row 'tpu'; there are .*h200-llama-3\.1-8b"):
        step_time("tpu")


def test_flat_steps_take_one_time_whatever_they_compute() -> None:
    works = (decode(1, 1), decode(256, 8192), prefill(8192), StepWork(512, 512**2, 8, 800))
    assert {step_time("flat-12.5ms").step_s(work) for work in works} == {0.0125}
    assert step_time("flat-12.5ms").step_s(StepWork()) == 0
