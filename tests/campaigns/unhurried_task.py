"""The selftest's small task with time to be stopped in each of its phases. Sleeps cost nobody's processor. No tests here."""

import time

from trainerd.engine.selftest.small_task import Small


class Unhurried(Small):
    """Prepares, evaluates and exports for more than a second each, in which the status shows it; the numbers are those of Small."""

    def prepare(self, ctx):  # type: ignore[no-untyped-def]
        for number in range(100):
            ctx.progress(number, 100, "rows")
            time.sleep(0.01)
        (ctx.cache_dir / "rows").write_text("100", encoding="ascii")

    def loss(self, model, batch, ctx):  # type: ignore[no-untyped-def]
        time.sleep(0.004 if ctx.training else 0.4)
        return super().loss(model, batch, ctx)

    def export(self, model, folder):  # type: ignore[no-untyped-def]
        time.sleep(2.5)
