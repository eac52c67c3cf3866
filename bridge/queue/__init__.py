"""JetStream 上的任务队列。"""
