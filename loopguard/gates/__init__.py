"""The four gates. They decide and keep their own statistics; the controller acts and records.

Every gate takes values and gives a `Decision`; none of them touches a file, a container or a weight. The last branch of
each denies, quarantines or freezes.
"""
