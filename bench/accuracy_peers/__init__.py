"""Published training-free compression methods, to compare ours with on the same model, images and budgets.

Each file holds one method, written from its paper's equations; where the paper leaves a constant open, the authors'
published default is taken, and said. They are measurements, not part of the product. Budgets are counted as
:func:`mixrank.allocate.allocate` counts them: all parameters of the whole model.
"""
