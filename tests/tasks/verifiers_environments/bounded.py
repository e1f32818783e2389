"""More rollouts are begun than may wait: those given up are played again, and nothing is left over."""

import asyncio
import sys

from lib.tasks import _verifiers_play as play
from lib.tasks._verifiers_live import Endpoint
from lib.tasks._verifiers_load import load


async def main():
    play.KEPT = 3
    async with Endpoint() as endpoint:
        request = {"environment": sys.argv[1], "args": {"kind": "game"}, "rows": 0}
        rollouts = play.Rollouts(await load(request, endpoint), endpoint)
        await rollouts.describe()
        row = (await rollouts.rows("train", 4, 5))[0]
        transcripts = [[*row["prompt"], {"role": "assistant", "content": str(n)}] for n in range(7)]
        for transcript in transcripts:
            assert (await rollouts.reply(row, transcript))[0]["content"] == "higher, 1"
        await asyncio.sleep(0.2)
        assert len(rollouts._waiting) == len(endpoint._lives) == 3, endpoint._lives
        scores = [await rollouts.score(row, transcript, False) for transcript in transcripts]
        assert [one["reward"] for one in scores] == [0.25] * 7, scores
        assert not rollouts._waiting and not rollouts._transcripts and not endpoint._lives
        for _ in range(300):
            await rollouts.reply(row, transcripts[0])
        await asyncio.sleep(0.2)
        left = [task for task in asyncio.all_tasks() if not task.done()]
        assert len(left) < 20, left


asyncio.run(main())
sys.stdout.write("\nRESULT null\n")
