"""What the library is measured against: *plain compositions*, written as the authors do, of torch modules one by one.

One family a file, with the authors' parameter names, so that a family's ``checkpoint_filter_fn`` carries the weights
over; the tests hold them to the authors' recorded outputs. They are the candidate ``plain`` of the tables.
"""
