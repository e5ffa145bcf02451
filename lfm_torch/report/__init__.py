"""From what was measured to what people read: a page, figures, a summary in the terminal.

Takes a Comparison, the history of a training, maps, spectra or distortions; gives files, figures and lines of text.
Nothing here measures. matplotlib, jinja2 and rich are loaded where something is drawn.
"""

from lfm_torch.report.write import check_available, write_report

__all__ = ["check_available", "write_report"]
