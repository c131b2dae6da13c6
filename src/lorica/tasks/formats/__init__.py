"""Files of records, one format a module: what is not what its name says, or says two things, is refused.

`text_files` checks what all text formats share; `columns` has what all tables share, and how large one may be.
"""
