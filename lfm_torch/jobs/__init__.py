"""A comparison as a job: planned, cut into pieces, stored piece by piece, and run by threads, torchrun or Ray.

``plan`` says what it will cost, ``tasks`` what there is to do, ``pieces`` how one piece is computed, ``tiles`` which
pairs go together, ``engines`` who does the work, ``store`` where finished pieces are, by ``fingerprints`` of what they
depend on.
"""
