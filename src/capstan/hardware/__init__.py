"""How fast is this machine, and how far away are the others?

    machine = this_machine()                 # measured once, then kept
    machine.link("host", "device").seconds(2**30)
    scenario("worldwide").link("Oregon-0", "Tokyo-24")

Everything here is plain data that planners read. Importing it imports neither torch nor anything heavy.
"""

from capstan.hardware.cluster import Cluster
from capstan.hardware.machine import Device, Link, Machine
from capstan.hardware.probe_machine import probe
from capstan.hardware.profile import this_machine
from capstan.hardware.regions import scenario

__all__ = ["Cluster", "Device", "Link", "Machine", "probe", "scenario", "this_machine"]
