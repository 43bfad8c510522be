"""run.py PROFILE PROGRAM ARGS...: a program under a seccomp profile of containers, made into a filter as runtimes do it.

Runs without a container: libseccomp is what they use, and a filter holds for whatever is executed in its place.
"""

import json
import os
import sys

import seccomp

ACTIONS = {"SCMP_ACT_ALLOW": lambda rule: seccomp.ALLOW, "SCMP_ACT_ERRNO": lambda rule: seccomp.ERRNO(rule.get("errnoRet", 1))}
COMPARISONS = {"SCMP_CMP_EQ": seccomp.EQ, "SCMP_CMP_MASKED_EQ": seccomp.MASKED_EQ}


def argument(a):
    # Of a masked comparison a profile says the mask, and that nothing of it is set.
    if a["op"] == "SCMP_CMP_MASKED_EQ":
        return seccomp.Arg(a["index"], seccomp.MASKED_EQ, a["value"], a.get("valueTwo", 0))
    return seccomp.Arg(a["index"], COMPARISONS[a["op"]], a["value"])


profile = json.load(open(sys.argv[1]))
default = {"errnoRet": profile.get("defaultErrnoRet", 1)}
filtered = seccomp.SyscallFilter(ACTIONS[profile["defaultAction"]](default))
for rule in profile["syscalls"]:
    for name in rule["names"]:
        try:
            seccomp.resolve_syscall(seccomp.Arch(), name)
        except ValueError:
            continue  # None of this machine: profiles name the calls of all.
        filtered.add_rule(ACTIONS[rule["action"]](rule), name, *map(argument, rule.get("args", [])))
filtered.load()
os.execv(sys.argv[2], sys.argv[2:])
