"""What it takes to let a frozen run go on, as values: who has to agree, to what exactly, and whether they did.

    sshsig      SSH keys and the signatures of `ssh-keygen -Y sign`: read, checked
    statement   the rule of a guard policy, the bytes that people sign, and every reason to refuse, each with a sentence
    book        what the log says so far of a freeze, its requests and its approvals, and what follows from it

Lives here: judgements, from values alone. No file, no clock, no key of anybody's; `approvals` reads the run directory
and records, and `audit.verify` asks the same questions of a log years later.
"""
