"""The server's promises under attack, each measured on a real server and on a weakened one."""
