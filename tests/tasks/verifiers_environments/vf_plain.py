"""A classic environment that needs nothing but verifiers to fail where verifiers is no longer classic."""

import verifiers as vf


class Plain(vf.SingleTurnEnv):
    pass


def load_environment():
    return Plain()
