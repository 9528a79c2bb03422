"""One HTML page; the paper's tables and figures.

page          the page
faithfulness  its part on faithfulness: measures that n-grams can't give
systems       its comparison of systems, its case study
latent_map    the map of the latent space (Figure 5)
sparsity      scores by users' training rows (Figure 4)
figures       its tables as CSV, its figures as PNG
charts        line charts as SVG
"""
