"""Matrix products over ragged groups of rows, one group an expert: what every expert layer is made of.

S rows (a token once for each of its experts, sorted by expert), E experts, I inputs, O outputs, R LoRA's rank.
"""
