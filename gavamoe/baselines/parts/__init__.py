"""What baselines are made of.

rating_tokens  CIER: a scale's ratings as tokens of the model
adapters       CIER, G-Refer: low-rank adapters on the attention
evidence       G-Refer: neighbors' training explanations, and profiles
lightgcn       XRec: vectors of users and items by a graph
profiles       XRec: what users and items often mention, as text
xrec_prompt    XRec: its prompt
injection      XRec: a vector added inside of the attention
hierarchy      PEVAE: encoders, distributions, their fusion, the discriminator
"""
