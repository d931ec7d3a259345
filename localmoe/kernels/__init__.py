"""The op contract, the Program it records into, and the devices that run one."""
