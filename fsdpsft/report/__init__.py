"""What the check and the plan find out, and how they show it: facts first, then terminal and page.

``proof`` goes through the rows, ``facts`` through the tokenised data, ``run_plan`` and ``footprint`` look ahead at the
run; none of them needs a GPU or a process group. ``terminal`` and ``page`` only show what those have found.
"""
