"""What training rows know of a pair that is to be explained.

pair_features   which features to name where nobody says
quotes          the training explanations most like what is asked for, for prompts that quote them
"""
