"""The passes: graph in, graph or facts out, one pass a file, in the order in which data goes through them.

    capture -> factorize -> enumerate_strategies -> stages -> solve -> rewrite

Only `rewrite` makes a graph; every other pass reads facts and returns new ones.
"""
