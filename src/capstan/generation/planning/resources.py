"""What a step keeps busy: the names by which the planner predicts it and the runtime measures it."""

DEVICE_COMPUTE = "device compute"
HOST_ATTENTION = "host attention"
HOST_MEMORY = "host memory"
HOST_TO_DEVICE, DEVICE_TO_HOST = "host->device", "device->host"
DISK_TO_HOST, HOST_TO_DISK = "disk->host", "host->disk"
