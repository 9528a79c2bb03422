"""One HTML page; the paper's tables and figures.

page          the page
faithfulness  its measures beyond n-grams
systems       its comparison of systems, its case study
figures       its tables as CSV, its figures as PNG
charts        line charts as SVG
"""
