from medgpt.medical.adversarial import table

print(table())
