"""What runs inside the sandboxes: the solution side, the judge side, and the wire between them.

Standard library only, and nothing of the workbench but this folder: it is all of it that the sandboxes can see.

    python -c "from lib.sandbox.inside.wire import encode; print(encode([1, (2, 3)]))"
"""
