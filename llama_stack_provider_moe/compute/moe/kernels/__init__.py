"""Matrix products over ragged groups of rows, one group per expert: the parts of every expert layer.

S rows (each token once per expert it uses, sorted by expert), E experts, I inputs, O outputs, R rank of LoRA.
"""
