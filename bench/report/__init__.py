"""Reports of the comparison: result files in; Markdown, LaTeX, figures and the README's section out.

``parts`` lays files of one set-up together and makes tables of them, ``claims`` holds them against what the suite must
show, ``markdown`` and ``latex`` print, ``figures`` draws (with the ``bench`` extra), ``readme`` owns a section of the
README, ``command`` is ``python -m bench report``. Nothing here measures, and nothing is left out: what lost and what
did not run is printed like the rest.
"""
