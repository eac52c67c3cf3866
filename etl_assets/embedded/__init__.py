"""轮子里的 PostgreSQL 与子进程。"""
