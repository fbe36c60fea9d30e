from medgpt.medical.adversarial import metrics_table

print(metrics_table())
