"""Command line: parse the arguments, make one call, print what came of it.

In: ``sys.argv``. Out: lines or JSON, and an exit code. Begin with ``main.main``.
"""
