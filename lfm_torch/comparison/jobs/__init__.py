"""A comparison as a job: planned, cut into pieces, stored piece by piece, and run by threads, torchrun or Ray.

``plan`` says what it will cost, ``tasks`` what there is to do, ``pieces`` how one piece is computed, ``blocks`` which
pairs go together, ``engines`` who does the work. Finished pieces are in the ``store``, named by what they depend on,
the ``library`` among it, and the values of pairs in its ``pair_values``.
"""
