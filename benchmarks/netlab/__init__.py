"""Ranks on one machine, each behind a network link of its own with a chosen rate and delay.

Every rank gets a network namespace, and in it one interface towards a switch that all share. As
root, or without where the system lets users have namespaces (`unshare --user`). Nothing has a name
outside: namespaces live as long as the processes that hold them, which end with the lab, whatever
becomes of it.

Linux with iproute2 and util-linux; nothing of arc_topk or torch is needed here.
"""
