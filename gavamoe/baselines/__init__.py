"""Rival systems: those that copy, and those that are trained in the explainer's place.

retrieval  systems that copy the nearest training text
frame      what a trained baseline is: one class
registry   the trained baselines by name
training   their training, checkpoints included
writing    their folder, and texts from it
scores     evaluation of any run, a baseline's or GaVaMoE's
peter      PETER and PETER+
nete       NETE
language_model  what baselines around a language model share
pepler     PEPLER and PEPLER+F
cier       CIER and CIER+F
g_refer    G-Refer's node retriever and G-Refer+F
xrec       XRec and XRec+F
pevae      PEVAE and PEVAE+F

What these are made of is in `parts`.

Shape letters: N training rows, B rows, T tokens, D embedding size, V vocabulary.
"""
