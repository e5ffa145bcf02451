"""A comparison as a job: planned, cut into pieces, stored piece by piece, and run by threads, torchrun or Ray.

``plan`` says what it will cost, ``tasks`` what there is to do, ``pieces`` how one piece is computed, ``blocks`` which
pairs go together, ``engines`` who does the work, ``store`` where finished pieces are, by ``fingerprints`` of what they
depend on, ``pair_values`` where the values of pairs stand in it.
"""
