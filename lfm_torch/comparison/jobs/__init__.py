"""A comparison as a job: planned, cut into pieces, stored piece by piece, and run by threads, torchrun or Ray.

``plan`` says what it will cost, ``settings`` how it is done, ``tasks`` what there is to do. ``reductions``, ``chance``
and ``blocks`` are its three stages: all representations, their chance levels, all pairs. An engine of ``engines`` hands
the ``job`` and its tasks to workers; ``pieces`` says how one is done. Finished pieces are in the ``store``, named by
what they depend on, the ``library`` among it; in its ``index`` are the ``pair_values`` and the ``draws`` of chance.
"""
