"""What tests share: tiny configs and models, fake writers, servers that stop by themselves."""
