"""Long steps and long prompts, by a real engine over real lanes."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from flume_common import engine_link
from flume_common.engine_progress import Activity
from flume_common.tasks import background
from flume_weight import messages as m
from flume_weight.messages import Stage

sys.path.insert(0, str(Path(__file__).parent))
from engine_rig import prompt, rig


def configure(made, step_target_ms):
    made.weight.send(
        m.Configure(
            tail_margin_tokens=128,
            mixed_prefill_tokens=128,
            step_timeout_s=10.0,
            step_target_ms=step_target_ms,
        )
    )


def place_of(made, name):
    """Of its first token among all that were said."""
    return next(
        number
        for number, message in enumerate(made.said)
        if isinstance(message, m.Produced) and any(token.sequence == name for token in message.tokens)
    )


async def test_a_short_prompt_does_not_wait_for_two_long_ones_and_tokens_stay_the_same():
    async with rig(4096) as made:
        alone = {name: await made.generate(name, prompt(size, seed), 4) for name, size, seed in PROMPTS}
        made.said.clear()
        configure(made, 100.0)
        for name, size, seed in PROMPTS:
            made.submit(name, prompt(size, seed), 4)
        for name, _, _ in PROMPTS:
            await made.end_of(name)
        assert {name: made.tokens(name) for name, _, _ in PROMPTS} == alone
        assert place_of(made, "short") < place_of(made, "first") < place_of(made, "second")
        steps = [message for message in made.said if isinstance(message, m.Sequences)]
        assert len(steps) > 8, "prompts were cut by time"


PROMPTS = [("first", 500, 1), ("second", 500, 2), ("short", 12, 3)]


async def test_an_engine_shows_how_far_it_is_in_a_long_step_and_is_let_work(monkeypatch):
    monkeypatch.setenv("FLUME_FAULT_PREFILL_LAYER_DELAY_MS", "150")
    monkeypatch.setattr(engine_link, "_LOOK_EVERY_S", 0.2)
    async with rig(2048) as made:
        async with background(watch=made.weight.watch(lambda: 1.5)):
            made.submit("a", prompt(40), 3)
            await made.until(lambda message: stages(message) == {"a": Stage.PREFILLING})
            seen = []
            while not made.tokens("a"):
                seen.append(made.weight.progress)
                await asyncio.sleep(0.3)
            assert len(made.tokens("a")) >= 1
        steps = [progress for progress in seen if progress.activity is Activity.STEPPING]
        assert len(steps) > 8
        assert {progress.prefill_tokens for progress in steps} == {40}
        assert {progress.total for progress in steps} == {30}
        layers = [progress.done for progress in steps]
        assert layers == sorted(layers) and layers[-1] > 20
        assert steps[-1].activity_s > 3.0 and max(progress.quiet_s for progress in steps) < 1.0
        await made.end_of("a")


def stages(message):
    if not isinstance(message, m.Sequences):
        return None
    return {state.sequence: Stage(state.stage) for state in message.sequences}


async def test_the_engine_reports_how_many_tokens_of_a_prompt_are_computed():
    async with rig(2048) as made:
        configure(made, 20.0)
        await made.generate("a", prompt(600), 2)
        reports = [message for message in made.said if isinstance(message, m.Sequences)]
        computed = [state.computed_tokens for message in reports for state in message.sequences]
        assert computed == sorted(computed)
        assert any(0 < tokens < 600 for tokens in computed)
