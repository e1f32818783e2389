"""What loading says to environments: [[environment, args], ...] on standard input, a text for each as JSON out."""

import asyncio
import json
import sys


async def refusal(environment, args):
    from lib.tasks._verifiers_live import Endpoint
    from lib.tasks._verifiers_load import load
    from lib.tasks._verifiers_play import Rollouts

    async with Endpoint() as endpoint:
        try:
            adapter = await load({"environment": environment, "args": args, "rows": 0}, endpoint)
            await Rollouts(adapter, endpoint).describe()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    told = [asyncio.run(refusal(environment, args)) for environment, args in asked]
    sys.stdout.write("\nRESULT " + json.dumps(told) + "\n")
